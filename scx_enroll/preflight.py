"""What would keep a certificate from being installed and proved keeps it from being asked for."""

from scx_enroll import access, request, service, verify
from scx_enroll.activate import Site
from scx_enroll.case import Step
from scx_enroll.config import Config
from scx_enroll.errors import AgentNotReady, ConfigError, NeedsPerson
from scx_enroll.observe import View


def check_agent(site: Site, config: Config, view: View, step: Step) -> None:
    """Raise AgentNotReady, HostError or ConfigError where a certificate that was issued now could not be put in service."""
    agent, root = view.ready.agent, site.root
    kind = request.kind_of(request.load_key(view.ready.pair.key or b"").public_key())
    new_key, rules = config.agent.new_key, verify.Rules(minimum_key=config.agent.minimum_key)
    weak, cure = verify.weakness(kind, rules), ""
    if verify.weakness(new_key, rules):
        cure = f"set new-key = {rules.minimum_key} in [agent]"
    if step.new_key and cure:
        raise ConfigError(f"new-key {new_key} is weaker than minimum-key {rules.minimum_key}; nothing was asked for", cure)
    if weak and not step.new_key:
        then = f"{cure}, then: " if cure else "make a stronger one: "
        raise NeedsPerson(f"the agent's {weak}; nothing was asked for", f"{then}scx-enroll run --rekey")
    site.store.beside.check_folder(agent.certificate)
    if step.new_key:
        site.store.beside.check_folder(agent.key)
        site.store.beside.check_link(agent.certificate)
    access.demand(root, agent)
    if view.seen.running:
        service.check_tool(root, agent.scxadmin)
    if view.seen.running and not view.seen.served and view.seen.loadable:
        raise AgentNotReady(
            f"the agent does not answer on port {agent.port}, so a new certificate could not be proved",
            f"start it ({agent.scxadmin} -start) and see {agent.log}",
        )
