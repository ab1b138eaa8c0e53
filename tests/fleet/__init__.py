"""A fleet of hosts under a virtual clock: the program's own `plan`, `journal` and `acquire`, over a CA and a store in memory."""
