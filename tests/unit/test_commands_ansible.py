"""ansible-playbook command lines, word for word."""

from __future__ import annotations

from pathlib import Path

from runbook_lib.commands import ansible

BOOKS = Path("/srv/playbooks")
INVENTORY = Path("/srv/inventory.yml")


def test_a_playbook_is_limited_to_the_hosts_that_are_named() -> None:
    command = ansible.playbook(
        "enable_maintenance.yml", folder=BOOKS, inventory=INVENTORY, limit=("app-01", "worker-01"), timeout_s=60
    )

    assert command.argv == (
        "ansible-playbook",
        "--inventory",
        "/srv/inventory.yml",
        "--limit",
        "app-01,worker-01",
        "/srv/playbooks/enable_maintenance.yml",
    )
    assert (command.timeout_s, command.cwd) == (60, BOOKS)


def test_a_deployment_names_commit_run_and_the_vaults_password_file() -> None:
    command = ansible.playbook(
        "deploy_release.yml",
        folder=BOOKS,
        inventory=INVENTORY,
        limit=("app-02",),
        extra={"git_ref": "a" * 40, "run_id": "20260101T000000Z-v1-abcdef"},
        vault_password_file=Path("/etc/vault"),
        timeout_s=600,
    )

    assert command.argv == (
        "ansible-playbook",
        "--inventory",
        "/srv/inventory.yml",
        "--limit",
        "app-02",
        "--extra-vars",
        f"git_ref={'a' * 40}",
        "--extra-vars",
        "run_id=20260101T000000Z-v1-abcdef",
        "--vault-password-file",
        "/etc/vault",
        "/srv/playbooks/deploy_release.yml",
    )


def test_host_keys_are_checked() -> None:
    command = ansible.playbook("x.yml", folder=BOOKS, inventory=INVENTORY, limit=("app-01",), timeout_s=1)

    assert command.env["ANSIBLE_HOST_KEY_CHECKING"] == "1"
