"""The lab: a certification authority with web pages, and a host with a stand-in agent.

Written from the collected facts about AD CS and the agent, never from the program: what is wrong in the program must not be
wrong here in the same way. Nothing in this package imports the program.
"""
