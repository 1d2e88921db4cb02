"""A Hub for tests: the protocol as huggingface_hub speaks it, over real HTTP, with files on another host (a CDN), LFS
and Xet, people and their rights, faults on demand, and a record of every request.

`with running_hub(folder) as hub: hub.put("org/model", {"config.json": b"{}", ...})`; then talk to `hub.endpoint`.
"""

from tests.hub.double import Asked, Entry, Fault, Hub, User, files_of, running_hub

__all__ = ["Asked", "Entry", "Fault", "Hub", "User", "files_of", "running_hub"]
