#!/usr/bin/python
"""Ansible module: wait until an instance is healthy and serves a commit; with `timeout_s: 0`, look once."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule

EVERY_S = 0.1
# No proxy of the machine has a say in a look at one of its own instances.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def look(url: str, commit: str) -> str | None:
    """Return None when all is well, else what is not."""
    try:
        with OPENER.open(url + "/version", timeout=5) as answer:
            serves = json.load(answer).get("commit")
        if serves != commit:
            return f"serves {serves}"
        OPENER.open(url + "/health", timeout=5).close()
    except urllib.error.HTTPError as error:
        return f"{error.url} answers {error.code}: {error.read(300).decode(errors='replace').strip()}"
    except (OSError, ValueError) as error:
        return f"does not answer: {error}"
    return None


def main() -> None:
    """Look until all is well or the time is over."""
    module = AnsibleModule(
        argument_spec={
            "url": {"required": True, "type": "str"},
            "commit": {"required": True, "type": "str"},
            "timeout_s": {"default": 40.0, "type": "float"},
        },
        supports_check_mode=True,
    )
    url, commit, timeout_s = (module.params[name] for name in ("url", "commit", "timeout_s"))
    deadline = time.monotonic() + timeout_s
    while (wrong := look(url, commit)) is not None:
        if time.monotonic() >= deadline:
            module.fail_json(msg=f"{url} should serve {commit} and {wrong}, after {timeout_s:g} s", serves=False)
        time.sleep(EVERY_S)
    module.exit_json(changed=False, serves=True)


if __name__ == "__main__":
    main()
