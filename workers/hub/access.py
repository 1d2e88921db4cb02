"""Whether a result may be published where its recipe says, found out before anything is merged."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from workers.hub.errors import HubForbidden, HubNotFound, HubTokenRefused

if TYPE_CHECKING:
    from merge_core.keys import HubKeys
    from workers.hub.client import HubClient


def place_of(document: Any) -> HubKeys | None:
    """Where on a Hub a document wants its result."""
    found: HubKeys | None = getattr(getattr(document, "outputs", None), "hub", None)
    return found


def check_write(client: HubClient, keys: HubKeys) -> None:
    """Raise `HubForbidden` or `HubTokenRefused` where the Hub says now that the token may not write there; and
    `HubUnavailable` where it says nothing.
    """
    with client.told(keys.repo):
        from huggingface_hub.errors import HfHubHTTPError

        try:
            who = client.api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            detail = f"{client.endpoint} does not take the token; store a good one and try again"
            raise HubTokenRefused(keys.repo, detail) from None
        name, owner = str(who.get("name")), keys.repo.partition("/")[0]
        orgs = {str(each.get("name")): each.get("roleInOrg") for each in who.get("orgs") or ()}
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise HubForbidden(keys.repo, f"the token of {name} only reads; store one that may write")
        is_ours = owner == name or (owner in orgs and orgs[owner] != "read")
        if _is_there(client, keys.repo):
            if keys.create_pr:
                return
            try:
                client.api.auth_check(keys.repo, write=True)
            except HfHubHTTPError as error:
                # A Hub that does not know the question says that it is not found.
                if error.response.status_code not in (403, 404) or (error.response.status_code == 404 and is_ours):
                    return
                raise HubForbidden(keys.repo, f"is not {name}'s to write to; take a repository of theirs") from None
        elif not is_ours:
            known = ", ".join([name, *orgs])
            detail = f"is not there, and {name} may not make it: theirs are repositories of {known}"
            raise HubForbidden(keys.repo, detail)


def _is_there(client: HubClient, repo: str) -> bool:
    with suppress(HubNotFound), client.told(repo):
        client.api.model_info(repo)
        return True
    return False
