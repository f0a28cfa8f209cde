"""The guards: what stands in the source, what it would be without the guard, and the tests that then fail.

`guards` takes them out one by one. What stands here must occur exactly once in its file: whoever changes such a line
mends its guard too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guard:
    """One thing that keeps a release safe.

    Args:
        name: in the operator's words.
        file: where it stands.
        there: its source text, exactly once in the file.
        instead: what replaces it; the file must still be Python.
        tests: pytest's ids; each must fail without the guard.
    """

    name: str
    file: str
    there: str
    instead: str
    tests: tuple[str, ...]


_LEDGER, _STEP, _LEASE = "runbook_lib/ledger.py", "runbook_lib/step.py", "runbook_lib/lease.py"
_FENCE, _GATE, _DECISIONS = "runbook_lib/fence.py", "runbook_lib/gate.py", "runbook_lib/decisions.py"
_SIGNATURES, _CANONICAL, _BACKUP = (
    "runbook_lib/signatures.py",
    "runbook_lib/canonical.py",
    "runbook_lib/phases/backup.py",
)
_CLOCK, _DUMPS, _OFF_SITE = (f"runbook_lib/{name}.py" for name in ("clock", "dumps", "off_site"))
_RESTORE, _FILES, _MIRROR = "runbook_lib/restore.py", "runbook_lib/backup_files.py", "runbook_lib/mirror.py"
_OBJECTS, _UPLOADS, _SHELL, _PROCESSES, _TABLE_FILES = (
    f"runbook_lib/adapters/{name}.py" for name in ("objects", "uploads", "shell", "processes", "table_files")
)
_EXECUTOR, _FSCK, _TESTIMONY, _MIGRATION, _MIGRATE = (
    f"runbook_lib/{name}.py" for name in ("executor", "fsck", "testimony", "migration", "phases/migrate")
)
_SEAL, _VERIFY, _VERIFY_DECISIONS = (
    f"runbook_lib/{name}.py" for name in ("archive", "verification", "verify_decisions")
)

_T_LEDGER, _T_STEP, _T_GATE = (f"tests/unit/test_{name}.py::test_" for name in ("ledger", "step", "gate"))
_T_DURABLE, _T_PROCESSES, _T_ARCHIVE = (
    f"tests/unit/test_{name}.py::test_" for name in ("durable", "processes", "archive")
)
_T_SIGNATURES, _T_HOST_FENCE = (f"tests/unit/test_{name}.py::test_" for name in ("signatures", "host_fence"))
_T_FSCK, _T_TESTIMONY, _T_MACHINES = (
    f"tests/unit/test_{name}.py::test_" for name in ("fsck", "testimony", "two_machines")
)
_T_OBJECTS, _T_UPLOADS, _T_MIRROR, _T_PROOF = (
    f"tests/contracts/test_{name}.py::test_" for name in ("objects", "uploads", "mirror", "proof")
)
_T_BACKUP, _T_FENCE, _T_OPENING, _T_HALF_DONE, _T_MIGRATE = (
    f"tests/phases/test_{name}.py::test_" for name in ("backup", "fence", "opening", "half_done", "migrate")
)

_STEPS = (
    Guard(
        "an interrupt leaves nothing at work without a lease",
        _STEP,
        "            for future in begun:\n                future.cancel()\n            wait(begun)\n",
        "            pass\n",
        tuple(f"{_T_STEP}an_interrupt_leaves_nothing_at_work_without_a_lease[{times}]" for times in (1, 3)),
    ),
    Guard(
        "what this very process is at is not left over",
        _STEP,
        "if (run.run_id, key) in _here:",
        "if False:",
        (f"{_T_STEP}what_another_thread_of_this_process_does_is_not_taken_for_left_over",),
    ),
    Guard(
        "an outcome is an executor's",
        _STEP,
        "        fence.epoch(run)\n        run.ledger.append(run.run_id, kind, data, guard=still_running)",
        "        run.ledger.append(run.run_id, kind, data, guard=still_running)",
        (f"{_T_STEP}an_outcome_is_not_written_by_who_has_no_lease",),
    ),
    Guard(
        "a run is not ended over a command that goes on",
        "runbook_lib/phases/rollback.py",
        'for name, group in processes.children(run.folder / now.intent["children"]):',
        "for name, group in ():",
        ("tests/unit/test_abort.py::test_a_command_that_goes_on_is_named_and_the_environment_is_not_free",),
    ),
    Guard(
        "a run is not ended over what another machine may still do",
        "runbook_lib/phases/rollback.py",
        "        lease.refuse_at_work(run, key, now.intent, now.intent_time)\n        for name, group",
        "        for name, group",
        ("tests/unit/test_abort.py::test_what_another_machine_may_still_do_is_not_ended_from_here",),
    ),
    Guard(
        "a signature without its statement does not spoil the record",
        _SEAL,
        "if path.is_file() and (alone or _LEFT_OVER.fullmatch(path.name)):",
        "if path.is_file() and _LEFT_OVER.fullmatch(path.name):",
        ("tests/unit/test_abort.py::test_a_signature_whose_statement_was_never_written_does_not_spoil_the_record",),
    ),
    Guard(
        "the intent is committed before the effect",
        _STEP,
        """\
        self._begin(run, key, intent)
        with _attempting(Attempt(key, number, folder)), _at_work_here(run, key):
            try:
                result = self.action(*arguments)
""",
        """\
        with _attempting(Attempt(key, number, folder)), _at_work_here(run, key):
            try:
                result = self.action(*arguments)
                self._begin(run, key, intent)
""",
        (f"{_T_STEP}the_intent_is_committed_before_the_effect",),
    ),
    Guard(
        "an outcome is written only while a step runs",
        _STEP,
        'if now.status is not Status.RUNNING or now.attempt != data["attempt"]:',
        'if now.attempt != data["attempt"]:',
        (
            f"{_T_STEP}an_outcome_is_only_written_while_its_own_attempt_runs[False]",
            f"{_T_OPENING}a_settled_step_is_never_reset_by_a_slower_executor",
        ),
    ),
    Guard(
        "an outcome is written only for its own attempt",
        _STEP,
        'if now.status is not Status.RUNNING or now.attempt != data["attempt"]:',
        "if now.status is not Status.RUNNING:",
        (f"{_T_STEP}an_outcome_is_only_written_while_its_own_attempt_runs[True]",),
    ),
    Guard(
        "a green step answers from the ledger",
        _STEP,
        "green = known.result if known.status is Status.GREEN else None",
        "green = None",
        (f"{_T_STEP}a_green_step_answers_from_the_ledger_and_does_nothing",),
    ),
    Guard(
        "a blocked step waits for a person",
        _STEP,
        "        if known.status is Status.BLOCKED:\n            raise _blocked(run, key, known.error)\n        with",
        "        with",
        (f"{_T_STEP}a_blocked_step_waits_for_a_person",),
    ),
    Guard(
        "the steps in front must be green",
        _STEP,
        "if not earlier.is_green(run, state):",
        "if False:",
        (f"{_T_STEP}no_step_starts_before_the_one_in_front_of_it_is_green",),
    ),
    Guard(
        "what changed meanwhile is seen inside the transaction that writes the intent",
        _STEP,
        "                self._refuse_out_of_order(run, state)\n                self._refuse_going_back",
        "                self._refuse_going_back",
        (f"{_T_STEP}what_changed_while_a_step_got_ready_is_seen_before_its_intent",),
    ),
    Guard(
        "of two executors that begin a step one does it",
        _STEP,
        'if now.status in (Status.GREEN, Status.RUNNING, Status.BLOCKED) or now.attempt + 1 != intent["attempt"]:',
        "if False:",
        (f"{_T_STEP}of_two_that_begin_a_step_at_once_one_does_it",),
    ),
    Guard(
        "a run that does not hold the environment changes nothing there",
        _STEP,
        'if self.phase not in ("prepare", "review") and not state.locked:',
        "if False:",
        (f"{_T_STEP}a_run_that_does_not_hold_its_environment_changes_nothing_there",),
    ),
    Guard(
        "steps behind a gate ask it again inside the transaction that writes their intent",
        _STEP,
        'intent["gates"] = dict(self.guard(run, state, self))',
        'intent["gates"] = {}',
        (f"{_T_GATE}with_its_approval_the_step_behind_the_gate_runs_and_names_it",),
    ),
    Guard(
        "a ledger that went away in the middle leaves the step in doubt, not failed",
        _STEP,
        "except (FencedError, LedgerUnavailableError):",
        "except ():",
        (f"{_T_STEP}a_ledger_that_is_away_in_the_middle_leaves_the_step_in_doubt",),
    ),
    Guard(
        "a step whose process still runs is left to it",
        _STEP,
        "        lease.refuse_at_work(run, key, known.intent, known.intent_time)\n",
        "",
        (f"{_T_STEP}a_step_whose_process_still_runs_is_left_to_it",),
    ),
    Guard(
        "commands that outlived their executor are waited for before the probe looks",
        _STEP,
        '            processes.wait_for_children(run.folder / known.intent["children"], timeout_s=self.timeout_s)\n',
        "            pass\n",
        (
            f"{_T_STEP}a_command_that_outlived_its_executor_has_ended_before_the_probe_looks",
            f"{_T_BACKUP}killed_while_dumping_the_dump_that_went_on_is_taken",
        ),
    ),
    Guard(
        "database sessions that outlived their executor are ended before the probe looks",
        _STEP,
        "            fence.end_left_over(run)\n",
        "            pass\n",
        (f"{_T_STEP}a_session_that_outlived_its_executor_has_ended_before_the_probe_looks",),
    ),
    Guard(
        "the probe is asked before a failed attempt is made again",
        _STEP,
        "elif known.status is Status.FAILED and not looked:",
        "elif False:",
        (
            f"{_T_STEP}a_failed_attempt_that_may_be_half_done_waits_for_a_person",
            f"{_T_STEP}a_failed_attempt_whose_effect_is_there_after_all_is_not_made_again",
            f"{_T_HALF_DONE}a_migration_that_its_time_out_ended_half_done_is_not_begun_again",
        ),
    ),
    Guard(
        "a probe whose target does not answer changes nothing",
        _STEP,
        "except (UnavailableError, DeniedError, psycopg.OperationalError) as error:",
        "except ZeroDivisionError as error:",
        (f"{_T_STEP}a_target_that_does_not_answer_pauses_and_changes_nothing",),
    ),
    Guard(
        "a probe that breaks tells nothing",
        _STEP,
        "raise StepInDoubtError(_cannot_tell(run, error)) from error",
        "return None",
        (f"{_T_STEP}a_probe_that_breaks_tells_nothing[KeyError('facts')]",),
    ),
    Guard(
        "a killed attempt that its probe finds red waits for a person",
        _STEP,
        """\
        except StepFailedError as error:
            raise self._block(run, key, known, _cannot_tell(run, error)) from error
""",
        """\
        except StepFailedError:
            found = None
""",
        (f"{_T_STEP}a_probe_that_breaks_tells_nothing[StepFailedError('red')]",),
    ),
    Guard(
        "what a failed attempt left at work has ended before the probe looks",
        _STEP,
        "if self.settle is not None or run.state.locked:",
        "if self.settle is None and run.state.locked:",
        (f"{_T_STEP}a_session_that_outlived_its_executor_has_ended_before_the_probe_looks[failed]",),
    ),
    Guard(
        "of several hosts none goes on before each that failed was looked at",
        _STEP,
        "if known.status is Status.FAILED and (found := self._look_again(run, item, self.key(item), known)):",
        "if found := None:",
        (f"{_T_STEP}items_that_failed_are_looked_at_before_any_goes_on",),
    ),
    Guard(
        "nothing but the review starts after the end",
        _STEP,
        'if state.ended and self.phase != "review":',
        "if False:",
        (
            f"{_T_STEP}after_the_end_a_green_step_is_still_shown_and_no_other_one_starts",
            f"{_T_STEP}what_changed_while_a_step_got_ready_is_seen_before_its_intent",
        ),
    ),
    Guard(
        "a step that another machine left in the middle is not taken for left",
        _LEASE,
        "if not processes.is_here(executor):",
        "if False:",
        (f"{_T_FENCE}a_step_that_another_machine_left_in_the_middle_is_taken_over_though_its_lease_was_given_back",),
    ),
    Guard(
        "the way back does not pass over a migration that may be half done",
        "runbook_lib/phases/rollback.py",
        "        migrate.migrate_production.settle_left_over(run)",
        "        pass",
        (f"{_T_HALF_DONE}the_way_back_does_not_pass_over_a_migration_that_may_be_half_done",),
    ),
    Guard(
        "going back runs the playbook at every touched host, whatever its process serves",
        "runbook_lib/phases/rollback.py",
        "    for host in touched_hosts(run):\n        done[host]",
        "    for host in touched_hosts(run):\n"
        "        if deploy.serving(run, host) == run.release.previous_commit:\n"
        "            done[host] = run.release.previous_commit\n"
        "            continue\n"
        "        done[host]",
        (f"{_T_HALF_DONE}a_host_that_was_switched_and_not_restarted_is_switched_back",),
    ),
    Guard(
        "a deployment is taken for done only when its playbook ended well",
        "runbook_lib/phases/deploy.py",
        'if not ended.is_file() or ended.read_text().strip() != "0":',
        "if False:",
        (f"{_T_HALF_DONE}a_deployment_whose_playbook_failed_behind_the_restart_is_done_to_its_end",),
    ),
    Guard(
        "what still runs on a host is waited for, and no person says what became of it",
        _FENCE,
        'raise PausedError(f"{host}: {done.tail(1)}"',
        'from runbook_lib.errors import StepInDoubtError; raise StepInDoubtError(f"{host}: {done.tail(1)}"',
        (
            "tests/unit/test_in_doubt.py::test_a_host_on_which_something_still_runs_is_asked_again_and_not_settled_by_a_person",
        ),
    ),
    Guard(
        "a schema is called as before when its objects are",
        "runbook_lib/phases/rollback.py",
        "    if not found:",
        "    if True:",
        (f"{_T_HALF_DONE}what_is_not_as_before_is_named_though_somebody_said_so",),
    ),
    Guard(
        "what only a person can tell is not done again",
        _STEP,
        """\
        if self.recovery is Recovery.ASK or self.settle is None:
            raise self._block(run, key, known, "only a person can tell whether it happened")
""",
        """\
        if self.settle is None:
            self._write(run, "step_reset", {"step": key, "attempt": known.attempt, "why": "repeatable"})
            return None
""",
        (f"{_T_STEP}what_only_a_person_can_tell_is_not_done_again",),
    ),
    Guard(
        "secrets are redacted in the ledger's errors",
        _STEP,
        '"error": run.secrets.redacted(said)[:4000],',
        '"error": said[:4000],',
        (f"{_T_STEP}a_secret_in_an_error_does_not_come_into_the_ledger",),
    ),
    Guard(
        "secrets are redacted in what a broken probe says",
        _STEP,
        "{run.secrets.redacted(' '.join(said.split()))[:1000]}",
        "{' '.join(said.split())[:1000]}",
        (f"{_T_STEP}a_secret_in_a_probes_error_does_not_come_into_the_ledger",),
    ),
)

_TOLD = f"{_T_FSCK}what_cannot_have_happened_is_named"
_SETTLES = f"{_T_TESTIMONY}nobody_settles_a_step_in_anothers_name"
_IN_DOUBT = (
    Guard(
        "a step in doubt is settled by who decides after it, and never by who opened the run",
        _TESTIMONY,
        "    _may_settle(run, step, person)\n",
        "",
        (
            f"{_SETTLES}[dan-dan-dan holds dba; prepare.freeze_merges is settled by deploy_lead]",
            f"{_SETTLES}[lea-lea-lea opened this run]",
        ),
    ),
    Guard(
        "who opened the run is not asked to settle its steps",
        "runbook_lib/params.py",
        "if roles & set(person.roles) and name != opener)",
        "if roles & set(person.roles))",
        (f"{_SETTLES}[lea-lea-lea opened this run]",),
    ),
    Guard(
        "a settlement is signed by its person",
        _TESTIMONY,
        "    decisions.check_signature(run, data, signature, person=person)\n    name =",
        "    name =",
        (f"{_SETTLES}[ada-bea-the signature is not ada's]",),
    ),
    Guard(
        "nothing is settled after the end",
        _TESTIMONY,
        "        _refuse_ended(state)\n",
        "",
        (f"{_T_TESTIMONY}a_run_that_ends_while_somebody_signs_takes_no_settlement",),
    ),
    Guard(
        "nobody signs for what later steps read",
        _TESTIMONY,
        'if done and (step.startswith("backup.") or step == "migrate.record_schema"):',
        "if False:",
        tuple(
            f"{_T_TESTIMONY}what_later_steps_read_is_made_again_and_not_signed_for[{step}]"
            for step in ("backup.dump_database", "backup.archive_files@app-01", "migrate.record_schema")
        ),
    ),
    Guard(
        "of two settlements the first one counts",
        _TESTIMONY,
        "if state.step(step).status is not Status.BLOCKED or state.step(step).attempt != now.attempt:",
        "if False:",
        (f"{_T_TESTIMONY}of_two_who_settle_a_step_at_once_the_first_one_counts",),
    ),
    Guard(
        "a spot check is signed by its person",
        _TESTIMONY,
        "    decisions.check_signature(run, data, signature, person=person)\n    recorded: dict",
        "    recorded: dict",
        ("tests/unit/test_panel.py::test_a_check_is_signed_like_a_gate[another's key]",),
    ),
    Guard(
        "who records a spot check has the role",
        _TESTIMONY,
        "if not set(who.roles) & set(run.params.gates.release.roles):",
        "if False:",
        ("tests/unit/test_panel.py::test_a_check_is_signed_like_a_gate[without the role]",),
    ),
)

_DURABLE = (
    Guard(
        "a file's content is on disk before it gets its name",
        _CANONICAL,
        "            os.fsync(file.fileno())\n",
        "",
        (f"{_T_DURABLE}a_file_is_on_disk_before_it_gets_its_name_and_its_folder_after",),
    ),
    Guard(
        "a name is on disk: its folder is synced",
        _CANONICAL,
        "    sync_folder(path.parent)\n",
        "",
        (f"{_T_DURABLE}a_file_is_on_disk_before_it_gets_its_name_and_its_folder_after",),
    ),
    Guard(
        "a file is replaced whole",
        _CANONICAL,
        "os.replace(scratch, path)",
        "path.write_bytes(Path(scratch).read_bytes()); os.unlink(scratch)",
        (f"{_T_DURABLE}who_reads_meanwhile_sees_the_old_content_or_the_new",),
    ),
    Guard(
        "an event is on disk before the ledger says so (SQLite)",
        _LEDGER,
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=NORMAL",
        (f"{_T_LEDGER}sqlite_is_durable",),
    ),
    Guard(
        "an event is on disk before the ledger says so (PostgreSQL)",
        _LEDGER,
        " -c synchronous_commit=on",
        "",
        (f"{_T_LEDGER}postgresql_is_durable_whatever_the_database_prefers",),
    ),
    Guard(
        "an archive of files is on disk before it gets its name",
        _BACKUP,
        "            with on_disk.syncing(part):\n                archived =",
        "            archived =",
        (f"{_T_BACKUP}a_backup_is_on_disk_before_it_gets_its_name",),
    ),
    Guard(
        "a packer that fails makes a backup red, whatever the archiver ended with",
        "runbook_lib/commands/pipeline.py",
        "if packing and status in (0, 1, -signal.SIGPIPE):",
        "if False:",
        (
            "tests/unit/test_commands_pipeline.py::test_the_exit_status_of_each_part_counts[python-exit 1-false-90-digest]",
        ),
    ),
    Guard(
        "a dump is on disk before it gets its name",
        _DUMPS,
        "    with on_disk.syncing(part):\n        result =",
        "    result =",
        (f"{_T_BACKUP}a_backup_is_on_disk_before_it_gets_its_name",),
    ),
    Guard(
        "a backup's name is on disk: its folder is synced",
        _FILES,
        "    sync_folder(final.parent)\n",
        "",
        (f"{_T_DURABLE}a_backup_gets_its_name_when_its_proof_is_on_disk_and_its_folder_follows",),
    ),
)

_EVENTS = (
    Guard(
        "events are only appended (SQLite)",
        _LEDGER,
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
        "BEGIN SELECT 1; END",
        (
            f"{_T_LEDGER}events_cannot_be_changed_or_removed[sqlite-UPDATE events SET data = '{{}}']",
            f"{_T_LEDGER}events_cannot_be_changed_or_removed[sqlite-DELETE FROM events]",
        ),
    ),
    Guard(
        "events are only appended (PostgreSQL)",
        _LEDGER,
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
        "$$ BEGIN RETURN NULL; END $$",
        (
            f"{_T_LEDGER}events_cannot_be_changed_or_removed[postgresql-UPDATE events SET data = '{{}}']",
            f"{_T_LEDGER}events_cannot_be_changed_or_removed[postgresql-DELETE FROM events]",
        ),
    ),
    Guard(
        "the table of events cannot be emptied (PostgreSQL)",
        _LEDGER,
        "UPDATE OR DELETE OR TRUNCATE",
        "UPDATE OR DELETE",
        (f"{_T_LEDGER}a_table_of_events_cannot_be_emptied",),
    ),
    Guard(
        "each event's hash covers it and the one before",
        _LEDGER,
        "if event.seq != number or event.prev != prev or event.digest != event.hash:",
        "if event.seq != number:",
        (f"{_T_LEDGER}an_event_changed_behind_the_triggers_breaks_the_chain[sqlite-data]",),
    ),
    Guard(
        "the ledger's numbers have no gap",
        _LEDGER,
        "if event.seq != number or event.prev != prev or event.digest != event.hash:",
        "if event.digest != event.hash:",
        (f"{_T_LEDGER}a_removed_event_breaks_the_chain[sqlite]",),
    ),
    Guard(
        "the chain is checked whenever a run's events are read",
        _LEDGER,
        "        check_chain(events)\n        return events",
        "        return events",
        (f"{_T_LEDGER}an_event_changed_behind_the_triggers_breaks_the_chain[sqlite-data]",),
    ),
    Guard(
        "a writer is alone from its first read on (SQLite)",
        _LEDGER,
        '"sqlite": "BEGIN IMMEDIATE"',
        '"sqlite": "BEGIN"',
        (f"{_T_LEDGER}writers_at_once_lose_nothing_and_keep_the_chain[sqlite]",),
    ),
    Guard(
        "a writer is alone from its first read on (PostgreSQL)",
        _LEDGER,
        '"postgresql": "LOCK TABLE events IN EXCLUSIVE MODE"',
        '"postgresql": "SELECT 1"',
        (f"{_T_LEDGER}writers_at_once_lose_nothing_and_keep_the_chain[postgresql]",),
    ),
    Guard(
        "a ledger that lost what this machine has seen takes no more events",
        _LEDGER,
        "                seen.refuse_lost(known, events)\n            if not",
        "                pass\n            if not",
        (f"{_T_LEDGER}a_ledger_that_lost_what_this_machine_has_seen_takes_no_more_events[sqlite]",),
    ),
    Guard(
        "a takeover of a run that does not hold its environment touches none of its targets",
        _LEASE,
        "fence.raise_everywhere(run) if run.state.locked else []",
        "fence.raise_everywhere(run)",
        (
            "tests/unit/test_two_machines.py::"
            "test_taking_over_a_run_that_does_not_hold_its_environment_touches_none_of_its_targets",
        ),
    ),
    Guard(
        "what a later version wrote is refused",
        _LEDGER,
        "if number != _FORMAT:",
        "if False:",
        ("tests/unit/test_golden.py::test_a_later_versions_record_is_refused_in_one_sentence",),
    ),
)

_EXECUTORS = (
    Guard(
        "an executor whose lease passed on writes nothing: its epoch is compared in the transaction",
        _LEDGER,
        "if self.epoch is not None and self.epoch != state.epoch:",
        "if False:",
        (f"{_T_LEDGER}an_executor_whose_lease_passed_on_can_write_nothing[sqlite]",),
    ),
    Guard(
        "the epoch of a new lease is above all before it, whatever the clock says",
        _LEDGER,
        "max(highest + 1, int(time.time() * 1000))",
        "int(time.time() * 1000)",
        (f"{_T_LEDGER}epochs_rise_though_the_clock_goes_back_and_a_new_ledger_is_above_an_older_one[sqlite]",),
    ),
    Guard(
        "an environment has one live run",
        _LEDGER,
        "if holder is not None and holder.run_id != run_id:",
        "if False:",
        (f"{_T_LEDGER}only_one_of_many_runs_gets_the_environment[sqlite]",),
    ),
    Guard(
        "a run that was overtaken in its environment takes a new epoch first",
        _LEDGER,
        "if state.epoch < self.highest_epoch(environment):",
        "if False:",
        (f"{_T_LEDGER}a_run_that_was_overtaken_in_its_environment_takes_a_new_epoch_first[sqlite]",),
    ),
    Guard(
        "a lease is not taken from a holder that lives",
        _LEASE,
        "if processes.alive(holder):",
        "if False:",
        (f"{_T_OPENING}one_executor_has_a_run",),
    ),
    Guard(
        "a holder on another machine is never taken for dead",
        _LEASE,
        "if not processes.is_here(holder):",
        "if False:",
        (f"{_T_OPENING}a_process_on_another_machine_is_never_taken_for_dead",),
    ),
    Guard(
        "a takeover that did not reach every target leaves the run shut",
        _LEASE,
        "if state.taking_over:",
        "if False:",
        (f"{_T_FENCE}a_takeover_that_cannot_reach_a_target_leaves_the_run_shut",),
    ),
    Guard(
        "a takeover ends the process that it takes over from",
        _LEASE,
        "if process is not None and not is_me(process):",
        "if False:",
        (f"{_T_FENCE}a_process_on_this_machine_is_ended_by_a_takeover",),
    ),
    Guard(
        "a takeover shuts the old executor out of every target",
        _LEASE,
        "fenced = fence.raise_everywhere(run)",
        "fenced = []",
        (f"{_T_FENCE}a_stalled_deployment_that_wakes_up_after_a_takeover_changes_nothing",),
    ),
    Guard(
        "a takeover ends the old executor's database sessions",
        _FENCE,
        '[(f"sessions in {d.production} and {d.staging}", lambda: _end_sessions(run))]',
        "[]",
        (f"{_T_FENCE}a_stalled_migration_loses_its_lock_and_the_new_one_is_done_once",),
    ),
    Guard(
        "a host refuses a lower epoch",
        _FENCE,
        """[ "$known" -le "$1" ] || {""",
        """[ "$known" -le "$1" ] || true || {""",
        (
            f"{_T_HOST_FENCE}a_lower_epoch_is_refused_by_the_host",
            f"{_T_FENCE}a_lower_epoch_is_refused_at_hosts_and_databases",
        ),
    ),
    Guard(
        "every module on a host asks for its epoch first",
        _FENCE,
        """[ "\\\\$(cat epoch)" = "$1" ] || {""",
        """[ "\\\\$(cat epoch)" = "$1" ] || true || {""",
        (f"{_T_HOST_FENCE}a_module_of_a_stale_executor_that_waited_for_the_lock_does_not_start",),
    ),
    Guard(
        "a newer executor waits until an older one's module has ended",
        _FENCE,
        "&& flock -w 300 9 || exit 75",
        "|| exit 75",
        (f"{_T_HOST_FENCE}a_newer_executor_waits_for_a_module_that_still_runs",),
    ),
    Guard(
        "a playbook's modules run behind the fence",
        _FENCE,
        'return replace(command, argv=(*first, "--extra-vars", json.dumps(words), playbook))',
        "return command",
        (f"{_T_FENCE}a_stalled_deployment_that_wakes_up_after_a_takeover_changes_nothing",),
    ),
    Guard(
        "a database refuses a lower epoch",
        _FENCE,
        "if known > mine:",
        "if False:",
        (f"{_T_FENCE}a_lower_epoch_is_refused_at_hosts_and_databases",),
    ),
    Guard(
        "one executor at a time changes a database",
        _FENCE,
        'session.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))',
        "pass",
        (f"{_T_FENCE}two_executors_are_never_in_one_database_at_once",),
    ),
    Guard(
        "a newer executor lets no program of an older one into a database",
        _FENCE,
        "            _admit_nobody(session, name)\n        yield session",
        "        yield session",
        (f"{_T_FENCE}a_stalled_migration_that_wakes_up_after_the_way_back_changes_nothing",),
    ),
    Guard(
        "who was overtaken freezes no merges",
        "runbook_lib/phases/prepare.py",
        ", sure=partial(fence.refuse_stale, run)",
        "",
        (f"{_T_FENCE}a_stalled_freeze_that_wakes_up_does_not_freeze_again",),
    ),
    Guard(
        "who was overtaken pushes no changelog",
        "runbook_lib/phases/complete.py",
        "sure=partial(fence.refuse_stale, run),",
        "",
        (f"{_T_FENCE}a_stalled_changelog_that_wakes_up_is_not_pushed",),
    ),
    Guard(
        "who was overtaken says nothing to people outside",
        "runbook_lib/outward.py",
        "    fence.refuse_stale(run)",
        "    pass",
        ("tests/unit/test_outward.py::test_who_was_overtaken_says_nothing_any_more",),
    ),
    Guard(
        "open doors do not stand for the workers behind them",
        "runbook_lib/phases/complete.py",
        "known = _open(run) if lifted else None",
        "known = _open(run)",
        ("tests/phases/test_complete_and_review.py::test_a_worker_that_rests_behind_open_doors_is_woken",),
    ),
    Guard(
        "a takeover ends what was let into a database just before",
        _FENCE,
        "    _end_sessions(run)  # of a program that was let in just before\n",
        "",
        (f"{_T_FENCE}what_was_let_in_just_before_a_newer_executor_came_is_ended",),
    ),
    Guard(
        "a migration tool's own sessions are behind the fence",
        "runbook_lib/migration.py",
        "command(replace(known, options=options))",
        "command(known)",
        (f"{_T_FENCE}a_stalled_migration_that_wakes_up_after_the_way_back_changes_nothing",),
    ),
    Guard(
        "a program is let into a database only as long as its executor is at work there",
        _FENCE,
        "                _admit_nobody(session, name)",
        "                pass",
        (f"{_T_FENCE}a_program_is_let_into_a_database_under_the_living_epoch_alone_and_as_who_it_would_be",),
    ),
)

_GONE = f"{_T_PROCESSES}a_process_is_only_taken_for_gone_where_this_machine_can_tell"
_COMMANDS = (
    Guard(
        "a command's exit status counts",
        _SHELL,
        "if exit_code not in command.ok_exits:",
        "if False:",
        (f"{_T_PROCESSES}a_wrong_exit_status_fails_with_the_last_words",),
    ),
    Guard(
        "a time-out ends a command with all that it started",
        _SHELL,
        "subprocess.TimeoutExpired as error:\n                end_group(child.pid)",
        "subprocess.TimeoutExpired as error:\n                child.kill()",
        (f"{_T_PROCESSES}a_time_out_ends_the_whole_group",),
    ),
    Guard(
        "secrets are redacted in logs",
        _SHELL,
        "self.secrets.redact_file(log)",
        "pass",
        (f"{_T_PROCESSES}secrets_are_redacted_in_the_log",),
    ),
    Guard(
        "a command is waited for though its starter was killed before it wrote its pid",
        _PROCESSES,
        "        _wait_lock(deadline, record)\n",
        "        pass\n",
        (f"{_T_PROCESSES}a_command_whose_starter_was_killed_before_it_wrote_its_pid_is_waited_for",),
    ),
    Guard(
        "a pid that was given to another process is not taken for the old one",
        _PROCESSES,
        'return here and start_time(int(process["pid"])) == int(process["start"])',
        'return here and start_time(int(process["pid"])) is not None',
        (f"{_T_PROCESSES}a_reused_pid_is_not_taken_for_the_old_process",),
    ),
    Guard(
        "a pid and a start time of an earlier boot are not taken for a living process",
        _PROCESSES,
        'here = is_here(process) and process["boot"] == boot_id()',
        "here = is_here(process)",
        (f"{_T_PROCESSES}a_process_of_an_earlier_boot_is_gone_though_its_pid_and_start_came_again",),
    ),
    Guard(
        "a process on another machine of the same name is not called gone",
        _PROCESSES,
        """if process["host"] != here["host"] or process.get("machine", here["machine"]) != here["machine"]:""",
        """if process["host"] != here["host"]:""",
        (f"{_GONE}[of another machine]",),
    ),
    Guard(
        "a process outside of this container is not called gone",
        _PROCESSES,
        'return bool(pids == here["pids"])',
        "return True",
        (f"{_GONE}[outside of this container]",),
    ),
    Guard(
        "a process of an earlier boot is called gone only where a machine is known by its id",
        _PROCESSES,
        """return bool(here["machine"]) and pids == here["pids"] == _INITIAL_PIDS""",
        "return True",
        tuple(
            f"{_GONE}[{what}]"
            for what in ("of a twin of the same name", "of a container that is gone", "of another container")
        ),
    ),
    Guard(
        "a command whose wrapper was killed alone is waited for",
        _PROCESSES,
        "            _wait_group(pid, deadline, record)\n",
        "            pass\n",
        (f"{_T_PROCESSES}a_command_whose_wrapper_was_killed_alone_is_waited_for",),
    ),
)

_AT_THE_DOOR, _PAST_THE_DOOR = (
    f"{_T_GATE}what_is_refused_at_the_door_is_not_recorded",
    f"{_T_GATE}a_decision_that_came_past_the_door_opens_nothing",
)
_GATES = (
    Guard(
        "a decision is signed by its person: asked at the door",
        _GATE,
        "    decisions.check_signature(run, data, signature, person=person)\n    recorded: dict",
        "    recorded: dict",
        (f"{_AT_THE_DOOR}[another's key]",),
    ),
    Guard(
        "a decision is signed by its person: asked again before each step behind the gate",
        _GATE,
        "    decisions.check_signature(run, data, signature, person=person)\n    for subject",
        "    for subject",
        (f"{_PAST_THE_DOOR}[another's key]",),
    ),
    Guard(
        "who opened the run does not approve it: asked at the door",
        _GATE,
        'if decision == "approve" and person == state.opened["opened_by"]:',
        "if False:",
        (f"{_AT_THE_DOOR}[who opened it]",),
    ),
    Guard(
        "who opened the run does not approve it: asked again before each step behind the gate",
        _GATE,
        ' or person == state.opened["opened_by"]:',
        ":",
        (f"{_PAST_THE_DOOR}[who opened it]",),
    ),
    Guard(
        "who decides has the role: asked at the door",
        _GATE,
        "    if role is None:\n",
        "    if False:\n",
        (f"{_AT_THE_DOOR}[without the role]",),
    ),
    Guard(
        "who decides has the role: asked again before each step behind the gate",
        _GATE,
        "if not set(run.params.people[person].roles) & set(gate.roles) or person",
        "if person",
        (f"{_PAST_THE_DOOR}[without the role]",),
    ),
    Guard(
        "a decision is over this run, round, nonce and ledger head: asked at the door",
        _GATE,
        "if data != expected:",
        "if False:",
        tuple(f"{_AT_THE_DOOR}[another {what}]" for what in ("run", "round", "nonce", "ledger")),
    ),
    Guard(
        "a decision is over this run, round, nonce and ledger head: asked again before each step behind the gate",
        _GATE,
        "if said[key] != value:",
        "if False:",
        tuple(f"{_PAST_THE_DOOR}[another {what}]" for what in ("run", "round", "nonce", "ledger")),
    ),
    Guard(
        "evidence is hashed again before each step behind the gate",
        _GATE,
        'if not path.is_file() or sha256_file(path) != subject["digest"]["sha256"]:',
        "if False:",
        (f"{_T_GATE}evidence_that_changed_after_the_approval_stops_the_step_behind",),
    ),
    Guard(
        "a decision's file is what was recorded",
        _DECISIONS,
        'if sha256(data) != recorded["sha256"] or sha256(signature) != recorded["signature_sha256"]:',
        "if False:",
        (f"{_T_GATE}a_decision_that_is_not_what_was_recorded_stops_the_step_behind[both]",),
    ),
    Guard(
        "a file that is not what its step proved makes the evidence red",
        _GATE,
        "if found != artifact.sha256:",
        "if False:",
        (f"{_T_GATE}nobody_approves_red_evidence",),
    ),
    Guard(
        "nobody approves what is red",
        _GATE,
        'if decision == "approve" and red:',
        "if False:",
        (f"{_T_GATE}nobody_approves_red_evidence",),
    ),
    Guard(
        "nobody approves what has timed out",
        _GATE,
        "if now.timed_out or Moment.now().since(now.opened_moment) > gate.timeout_s:\n        raise UsageError",
        "if False:\n        raise UsageError",
        (f"{_T_GATE}nobody_approves_what_has_timed_out",),
    ),
    Guard(
        "a clock that is set times nobody out",
        _CLOCK,
        "if self.boot and self.boot == other.boot:",
        "if False:",
        (
            "tests/unit/test_clock.py::test_a_clock_that_is_set_shortens_and_lengthens_nothing[86400.0]",
            f"{_T_OPENING}a_clock_that_is_set_while_a_gate_is_open_times_nobody_out[86400.0]",
        ),
    ),
    Guard(
        "evidence that changed opens a new round",
        _GATE,
        "if now.round and not now.timed_out and now.evidence_sha256 == sha256(content):",
        "if now.round and not now.timed_out:",
        (f"{_T_GATE}evidence_that_changed_is_asked_about_again",),
    ),
    Guard(
        "a quorum is waited for",
        _GATE,
        "if len(valid) < gate.quorum:",
        "if not valid:",
        (f"{_T_GATE}a_quorum_is_of_different_people",),
    ),
    Guard(
        "a quorum is of different people",
        _GATE,
        'valid[recorded["person"]] = recorded',
        "valid[str(len(valid))] = recorded",
        (f"{_T_GATE}a_quorum_is_of_different_people",),
    ),
    Guard(
        "one rejection closes the gate",
        _GATE,
        """    if any(d["decision"] == "reject" for d in now.decisions):
        raise _rejected(run, name, now)
    valid""",
        "    valid",
        (f"{_T_GATE}one_rejection_closes_the_gate",),
    ),
    Guard(
        "ssh-keygen's no is a no",
        _SIGNATURES,
        "    if done.returncode:\n",
        "    if False:\n",
        (f"{_T_SIGNATURES}anything_else_is_refused",),
    ),
    Guard(
        "no byte of a .sig can be changed unseen",
        _SIGNATURES,
        "return armored(blob) == signature and _well_formed(blob)",
        "return True",
        (f"{_T_SIGNATURES}what_ssh_keygen_passes_over_is_not_canonical",),
    ),
    Guard(
        "a key that was taken from a person opens nothing any more",
        _GATE,
        """f'{words[0]} {words[1]},valid-before="{now}" {" ".join(words[2:])}'""",
        "line",
        ("tests/unit/test_trust.py::test_an_ended_key_opens_nothing_any_more_and_what_it_signed_still_verifies",),
    ),
)

_CARRIED = f"{_T_MACHINES}a_ledger_that_carries_another_statement_than_it_names_writes_nothing"
_MACHINES = (
    Guard(
        "what a step leaves is in the store before the ledger names it",
        _STEP,
        """\
        mirror.push(run, ended=key)
        self._write(run, "step_outcome", data)
""",
        """\
        self._write(run, "step_outcome", data)
        mirror.push(run, ended=key)
""",
        (f"{_T_MIRROR}what_a_step_leaves_is_in_the_store_before_the_ledger_names_it",),
    ),
    Guard(
        "what a gate asks about is in the store, whoever opened its round",
        _GATE,
        "    mirror.put(run, path.name, content)\n",
        "",
        (f"{_T_MIRROR}what_a_gate_asks_about_is_in_the_store_before_the_ledger_names_it",),
    ),
    Guard(
        "who is slower to ask at a gate writes nothing over what people are shown",
        _GATE,
        "        write_atomically(path, content)\n\n    mirror.put(run, path.name, content)\n",
        "\n    mirror.put(run, path.name, content)\n    write_atomically(path, content)\n",
        ("tests/unit/test_gate.py::test_who_is_slower_to_ask_writes_nothing_over_what_people_are_shown",),
    ),
    Guard(
        "no gate is asked after the end",
        _GATE,
        "if state.ended or state.gate(name).round != now.round:",
        "if state.gate(name).round != now.round:",
        ("tests/unit/test_gate.py::test_no_gate_is_asked_after_the_end",),
    ),
    Guard(
        "a cell goes forward on no file that is nowhere",
        _STEP,
        """\
            if self.phase not in _NOT_FORTH:
                mirror.refuse_missing(run)
""",
        "",
        (f"{_T_MIRROR}a_cell_goes_forward_on_no_such_file_either_however_often_it_is_run",),
    ),
    Guard(
        "a sealed record gets only what it names",
        _MIRROR,
        "if record is not None and (there or not _of(record, name, wanted)) and not name.startswith(_REVIEW):",
        "if record is not None and there and not name.startswith(_REVIEW):",
        (f"{_T_MIRROR}a_sealed_record_gets_no_file_that_it_does_not_name",),
    ),
    Guard(
        "what a lost machine never sent is no part of the record that another one sealed",
        _MIRROR,
        "                _set_aside(folder, scratch)\n",
        "                pass\n",
        (f"{_T_MIRROR}what_a_lost_machine_never_sent_gets_into_no_sealed_record",),
    ),
    Guard(
        "what a sealed record does not name is sent to nobody",
        _MIRROR,
        "if record is not None and name not in (STATEMENT, SEAL) and not name.startswith(_REVIEW):",
        "if False:",
        (f"{_T_MIRROR}what_a_lost_machine_never_sent_gets_into_no_sealed_record",),
    ),
    Guard(
        "who looks at a failed attempt does not take its command for his own",
        _STEP,
        '        again["begun_by"] = lease.began_it(known.intent)\n',
        "",
        (
            "tests/phases/test_fence.py::test_who_looks_at_a_failed_migration_and_is_killed_does_not_take_it_for_its_own",
        ),
    ),
    Guard(
        "undoing migrations is not settled as done",
        "runbook_lib/testimony.py",
        'if done and step == "rollback.restore_schema":',
        "if False:",
        ("tests/unit/test_testimony.py::test_undoing_migrations_is_not_settled_as_done",),
    ),
    Guard(
        "what a step beside is still writing is not mirrored",
        _MIRROR,
        "if name.startswith(writing) or path.name",
        "if path.name",
        (f"{_T_MIRROR}what_a_step_beside_is_still_writing_is_not_mirrored",),
    ),
    Guard(
        "nothing goes forward on a file that is nowhere",
        _EXECUTOR,
        "    mirror.refuse_missing(run)\n",
        "",
        (f"{_T_MIRROR}nothing_goes_forward_on_a_file_that_is_nowhere",),
    ),
    Guard(
        "a file that was changed here comes back as the ledger names it",
        _MIRROR,
        "if there and sha256_file(target) == wanted:",
        "if there:",
        (f"{_T_MIRROR}a_file_that_is_gone_or_was_changed_here_comes_back",),
    ),
    Guard(
        "what a step is writing here is not written over by its older copy",
        _MIRROR,
        "return running or (state.executor",
        "return (state.executor",
        (f"{_T_MIRROR}what_a_step_is_writing_here_is_left_alone",),
    ),
    Guard(
        "what a living executor is writing here is not written over by its older copy",
        _MIRROR,
        "return running or (state.executor is not None and processes.alive(state.executor))",
        "return running",
        (f"{_T_MIRROR}what_an_executor_here_may_be_writing_is_left_alone",),
    ),
    Guard(
        "a sealed record is not written over by its copy",
        _MIRROR,
        "if record is not None and (there or not _of(record, name, wanted)) and not name.startswith(_REVIEW):",
        "if record is not None and not _of(record, name, wanted) and not name.startswith(_REVIEW):",
        (f"{_T_MIRROR}a_sealed_record_is_not_written_to",),
    ),
    Guard(
        "a run's folder that came only half is no run yet",
        _MIRROR,
        'key=lambda item: (item[0] == "params.json", item[0] == SEAL)',
        "key=lambda item: item[0]",
        (f"{_T_MIRROR}a_folder_that_came_only_half_is_no_run_yet",),
    ),
    Guard(
        "an older list of a run's files is not taken for the newest",
        _MIRROR,
        "if sha256(content) == listed:",
        "if True:",
        (f"{_T_MIRROR}the_newest_list_is_what_counts_also_where_an_older_one_was_read",),
    ),
    Guard(
        "a statement that comes with the ledger is what the ledger names",
        _DECISIONS,
        'if sha256(content) != digest or path.parent != run.folder / "decisions":',
        'if path.parent != run.folder / "decisions":',
        (f"{_CARRIED}[the statement]", f"{_CARRIED}[the signature]"),
    ),
    Guard(
        "a statement that comes with the ledger lands among the decisions and nowhere else",
        _DECISIONS,
        'if sha256(content) != digest or path.parent != run.folder / "decisions":',
        "if sha256(content) != digest:",
        (f"{_CARRIED}[where it stands]",),
    ),
    Guard(
        "a statement that was changed here is not covered up by what comes with the ledger",
        _DECISIONS,
        "if not file.exists():",
        "if True:",
        (f"{_T_MACHINES}a_statement_that_was_changed_here_is_not_taken_from_the_ledger",),
    ),
    Guard(
        "no statement is written into a sealed record",
        _DECISIONS,
        'if "statement_json" not in recorded or (run.folder / "statement.json.sig").exists():',
        'if "statement_json" not in recorded:',
        (f"{_T_MACHINES}a_sealed_record_gets_no_statement_any_more",),
    ),
)

_MIGRATIONS = (
    Guard(
        "a migration outside a transaction that was ended in the middle is not begun again",
        _MIGRATE,
        "if not migrations.transactional(files[pending[0]]):",
        "if False:",
        (
            f"{_T_HALF_DONE}a_migration_that_its_time_out_ended_half_done_is_not_begun_again",
            f"{_T_HALF_DONE}a_rehearsal_on_staging_that_its_time_out_ended_half_done_is_not_begun_again",
        ),
    ),
    Guard(
        "a rehearsal that may be half done on staging is not begun again",
        _MIGRATE,
        'if _refuse_half_done(run, staging, intent, "staging-migrate"):',
        "if migration.pending_versions(run, staging):",
        (f"{_T_HALF_DONE}a_rehearsal_on_staging_that_its_time_out_ended_half_done_is_not_begun_again",),
    ),
    Guard(
        "a migration that another machine left may have begun there",
        _MIGRATE,
        "return not seen or any(",
        "return any(",
        (f"{_T_FENCE}a_migration_outside_a_transaction_that_another_machine_left_is_not_begun_again",),
    ),
    Guard(
        "a migration outside a transaction is known by its file",
        "runbook_lib/commands/migrations.py",
        r'return len(found) == 1 and re.search(r"\btransaction:\s*false\b", found[0].partition("\n")[0]) is None',
        "return True",
        ("tests/unit/test_commands_migrations.py::test_a_migration_outside_a_transaction_is_known",),
    ),
    Guard(
        "an undo outside a transaction is known by its file",
        "runbook_lib/phases/rollback.py",
        'if left[0] in files and not migrations.transactional(files[left[0]], "down"):',
        "if False:",
        (
            "tests/phases/test_half_done.py::test_an_undo_that_may_be_done_while_its_row_is_still_there_is_not_done_twice",
        ),
    ),
    Guard(
        "a recorded schema that is lost or another one is nothing to compare with",
        "runbook_lib/phases/rollback.py",
        "if not recorded.is_file() or sha256_file(recorded) != kept.sha256:",
        "if False:",
        ("tests/phases/test_half_done.py::test_a_recorded_schema_that_is_lost_is_not_as_before",),
    ),
    Guard(
        "from a request to go back on no step of the way forth starts",
        _STEP,
        "        self._refuse_going_back(run, state)\n        if known.status",
        "        if known.status",
        (f"{_T_STEP}from_a_request_to_go_back_on_no_step_of_the_way_forth_starts",),
    ),
    Guard(
        "a request to go back is seen inside the transaction that writes the intent",
        _STEP,
        "                self._refuse_going_back(run, state)\n            if self.phase",
        "            if self.phase",
        (f"{_T_STEP}a_request_to_go_back_that_comes_meanwhile_is_seen_before_the_intent",),
    ),
    Guard(
        "what a failed attempt left running has ended before the next one",
        _STEP,
        "if self.settle is not None or run.state.locked:",
        "if self.settle is not None:",
        (f"{_T_STEP}what_a_failed_attempt_left_running_has_ended_before_the_next_one",),
    ),
    Guard(
        "who gave its lease back is over only where its commands are seen",
        _LEASE,
        "gave_back = processes.is_here(executor) and dict(",
        "gave_back = dict(",
        (f"{_T_FENCE}a_step_that_another_machine_left_in_the_middle_is_taken_over_though_its_lease_was_given_back",),
    ),
    Guard(
        "a kernel that hangs is not over when its executor gave the lease back",
        _LEASE,
        "dict(state.released.get(epoch, {})) == executor",
        "epoch in state.released",
        ("tests/unit/test_abort.py::test_a_kernel_that_hangs_under_an_executor_that_ended_is_not_over",),
    ),
    Guard(
        "who takes the lease has what another machine left meanwhile",
        _LEASE,
        "        mirror.catch_up(run)\n",
        "",
        (f"{_T_MIRROR}a_kernel_that_stays_open_while_another_machine_goes_on_has_what_that_one_left",),
    ),
    Guard(
        "a list that was put and not noted is this machine's",
        _MIRROR,
        "return sha256_file(scratch / _PUT) == listed",
        "return False",
        (f"{_T_MIRROR}a_list_that_was_put_and_not_noted_is_not_taken_for_another_machines",),
    ),
    Guard(
        "other machines have the seal as soon as it is there",
        "runbook_lib/executor.py",
        "            _seal(run)\n            mirror.push(run)\n",
        "            _seal(run)\n",
        (f"{_T_MIRROR}a_record_is_sealed_once_and_reviewed_elsewhere",),
    ),
    Guard(
        "a run whose folder is lost is ended only when nobody is at work on it",
        _LEASE,
        "    refuse_held(state)\n    for intent in in_the_middle(state):\n        if _stands_in_the_way(state, intent):",
        "    for intent in in_the_middle(state):\n        if False:",
        ("tests/unit/test_abort.py::test_a_run_whose_folder_is_lost_is_ended_in_the_ledger",),
    ),
    Guard(
        "a host's epoch that is no number is not guessed",
        _FENCE,
        "*[!0-9]* | '') echo",
        "no-such-thing) echo",
        (
            "tests/unit/test_host_fence.py::test_who_was_last_at_a_host_is_not_guessed_from_an_epoch_that_is_no_number[]",
        ),
    ),
    Guard(
        "a host's epoch that could not be written whole does not replace the one before",
        _FENCE,
        "printf '%s\\\\n' \"$1\" > epoch.new\n",
        "printf '%s\\\\n' \"$1\" > epoch.new || true\n",
        ("tests/unit/test_host_fence.py::test_an_epoch_that_cannot_be_written_leaves_the_one_before",),
    ),
    Guard(
        "a story without the lease or the environment is named",
        "runbook_lib/fsck.py",
        "lambda: _told(events, _held)),",
        "lambda: None),",
        ("tests/unit/test_fsck.py::test_what_cannot_have_happened_is_named[a step of a takeover]",),
    ),
    Guard(
        "a story that goes forth after it was to go back is named",
        "runbook_lib/fsck.py",
        "lambda: _told(events, _one_way)),",
        "lambda: None),",
        ("tests/unit/test_fsck.py::test_what_cannot_have_happened_is_named[forth on the way back]",),
    ),
    Guard(
        "a migration that may still be at work in the server is waited for",
        _MIGRATE,
        "    migration.refuse_while_migrating(run, database)\n",
        "",
        (f"{_T_MIGRATE}a_session_of_the_migration_role_that_is_still_at_work_is_waited_for",),
    ),
    Guard(
        "only what was rehearsed goes to production",
        _MIGRATE,
        "    if not_rehearsed:\n",
        "    if False:\n",
        (f"{_T_MIGRATE}a_migration_that_was_not_rehearsed_does_not_go_to_production",),
    ),
    Guard(
        "a migration in production that the release does not know stops it",
        _MIGRATE,
        "    if unknown:\n",
        "    if False:\n",
        (f"{_T_MIGRATE}a_migration_in_production_that_the_release_does_not_know_stops_it",),
    ),
    Guard(
        "a migration that could not be taken back from under a newer one stops it",
        _MIGRATE,
        'if under and run.params.migrations.tool == "dbmate":',
        "if False:",
        (f"{_T_MIGRATE}a_migration_that_would_land_under_a_newer_one_could_not_be_undone_and_stops_it",),
    ),
    Guard(
        "a long transaction stops the migration",
        _MIGRATE,
        "    if found:\n",
        "    if False:\n",
        (f"{_T_MIGRATE}a_long_transaction_stops_the_migration",),
    ),
    Guard(
        "a schema that is not the release's is no success",
        _MIGRATE,
        "if now != expected:",
        "if False:",
        (f"{_T_MIGRATE}a_schema_that_is_not_the_releases_is_named",),
    ),
    Guard(
        "who still waits for a lock after the migration is seen",
        _MIGRATE,
        "    if blocked:\n",
        "    if False:\n",
        (f"{_T_MIGRATE}who_still_waits_for_a_lock_after_the_migration_is_named",),
    ),
    Guard(
        "the way back undoes nothing under a migration of somebody else",
        _MIGRATION,
        'if path is None or (m.tool == "dbmate" and newest != version):',
        "if path is None:",
        (f"{_T_MIGRATE}the_way_back_undoes_nothing_under_a_migration_of_somebody_else",),
    ),
    Guard(
        "a migration that does not say how it is undone is left to a person",
        _MIGRATION,
        "if not migrations.reversible(path):",
        "if False:",
        (f"{_T_MIGRATE}a_migration_that_does_not_say_how_it_is_undone_is_left_to_a_person",),
    ),
)

_BACKUPS = (
    Guard(
        "a restore into a scratch database is compared with the source's inventory",
        _RESTORE,
        "found = inventory.differences(source, restored)",
        "found: list[str] = []",
        (f"{_T_BACKUP}a_damaged_dump_does_not_pass[row]",),
    ),
    Guard(
        "a dump stands only when its tables are still those that the snapshot saw",
        _DUMPS,
        "    names = now_moved(run, tables)\n    if names:",
        "    names = now_moved(run, tables)\n    if False:",
        (f"{_T_BACKUP}a_table_that_was_reloaded_while_it_was_dumped_is_named_and_dumped_again",),
    ),
    Guard(
        "a dump that went on by itself is taken only when its tables are still those that the snapshot saw",
        _BACKUP,
        ' and not dumps.now_moved(run, known["tables"])',
        "",
        (f"{_T_BACKUP}killed_while_dumping_a_dump_whose_tables_changed_since_is_not_taken",),
    ),
    Guard(
        "a table that was truncated or rewritten is not what a snapshot saw",
        _TABLE_FILES,
        "elif there[1] != file:",
        "elif False:",
        (f"{_T_PROOF}what_a_snapshot_does_not_protect_is_named",),
    ),
    Guard(
        "another table under the same name is not what a snapshot saw",
        _TABLE_FILES,
        "elif there[0] != oid:",
        "elif False:",
        (f"{_T_PROOF}what_a_snapshot_does_not_protect_is_named",),
    ),
    Guard(
        "another column under the same name is not what a snapshot saw",
        _TABLE_FILES,
        "elif there[2][: len(columns)] != columns:",
        "elif False:",
        (f"{_T_PROOF}what_a_snapshot_does_not_protect_is_named",),
    ),
    Guard(
        "no table takes another's place in an inventory",
        "runbook_lib/adapters/inventory.py",
        "if other is not row:",
        "if False:",
        (f"{_T_PROOF}tables_whose_names_an_inventory_cannot_tell_apart_are_refused",),
    ),
    Guard(
        "a dump that changed since is not restored",
        _BACKUP,
        "            if digests[dump].result() != was_dumped:\n",
        "            if False:\n",
        (f"{_T_BACKUP}a_dump_that_changed_since_is_not_restored",),
    ),
    Guard(
        "a dump that is not the manifest's is not restored",
        _RESTORE,
        "if found != expected:",
        "if False:",
        ("tests/unit/test_restore.py::test_a_dump_that_is_not_the_manifests_is_not_restored",),
    ),
    Guard(
        "a dump that is unpacked leaves its disk its free share",
        _RESTORE,
        "most = room.spare_bytes(dump_file.parent, free_ratio)",
        "most = 1 << 40",
        ("tests/unit/test_restore.py::test_unpacking_stops_when_its_disk_would_be_too_full[zstd-2097452-False]",),
    ),
    Guard(
        "nothing is restored on a server whose room nobody knows",
        "runbook_lib/room.py",
        "        if not self.total_bytes:",
        "        if False:",
        ("tests/phases/test_prepare.py::test_a_server_whose_volume_nobody_knows_is_refused_with_its_table",),
    ),
    Guard(
        "a proof restores into none of the dump's tablespaces, whose room nobody measured",
        "runbook_lib/commands/postgres.py",
        '        "--no-tablespaces",\n',
        "",
        (f"{_T_PROOF}a_proof_fills_no_tablespace_and_needs_none",),
    ),
    Guard(
        "a proof restores into no tablespace of the role's own settings",
        "runbook_lib/commands/postgres.py",
        '"default_tablespace=", ',
        "",
        (f"{_T_PROOF}a_proof_fills_no_tablespace_and_needs_none",),
    ),
    Guard(
        "a proof by command is not begun without room",
        "runbook_lib/room.py",
        'raise UsageError(f"the proof is not begun: {lack}", remedy=one.remedy)',
        "pass",
        (f"{_T_BACKUP}a_dump_is_proved_later_by_command",),
    ),
    Guard(
        "a proof by command that is ended drops what it restored",
        "runbook_lib/backup_verbs.py",
        "    terminal.ended_by_signals()",
        "    pass",
        ("tests/contracts/test_proof_command.py::test_who_ends_a_proof_leaves_nothing_of_production_behind",),
    ),
    Guard(
        "what could not be tried is not called a bad dump",
        "runbook_lib/backup_verbs.py",
        "except (UnavailableError, DeniedError):",
        "except ZeroDivisionError:",
        (
            "tests/contracts/test_proof_command.py::test_a_server_that_stops_says_nothing_of_the_dump_and_what_it_keeps_is_named",
        ),
    ),
    Guard(
        "who is interrupted while a restore is compared does not wait for all of it",
        _RESTORE,
        "scratch.drop()  # ends them",
        "pass",
        (
            "tests/contracts/test_proof_command.py::test_who_is_interrupted_while_comparing_does_not_wait_for_the_rest_of_it",
        ),
    ),
    Guard(
        "a command of no step ends with whom it was for",
        _SHELL,
        "if not self.left_on_interrupt:",
        "if False:",
        (f"{_T_PROCESSES}who_is_interrupted_leaves_a_command_only_where_somebody_finds_it_again[False]",),
    ),
    Guard(
        "what a killed proof left is named",
        "runbook_lib/doctor.py",
        "    if left:",
        "    if False:",
        ("tests/unit/test_doctor.py::test_what_a_killed_proof_left_is_named_with_how_to_drop_it",),
    ),
    Guard(
        "a failed step drops what it sent ahead",
        _UPLOADS,
        "if kind is not None and self._upload:",
        "if False:",
        (f"{_T_UPLOADS}what_a_failed_step_sent_does_not_stay_in_the_store",),
    ),
    Guard(
        "a run that ends drops what it sent ahead",
        _EXECUTOR,
        "        off_site.drop_unfinished(run)\n",
        "",
        ("tests/phases/test_sent_ahead.py::test_a_run_that_ends_leaves_nothing_half_sent",),
    ),
    Guard(
        "parts that are no object yet count in the bucket's room",
        _OBJECTS,
        "return half + sum(",
        "return sum(",
        (f"{_T_OBJECTS}parts_that_are_no_object_yet_are_counted_and_dropped",),
    ),
    Guard(
        "a dump is read to its last byte",
        _RESTORE,
        'postgres.read_through(unpacked, timeout_s=timeout_s), name="pg_restore-read"',
        'postgres.list_contents(unpacked), name="pg_restore-list-again"',
        (f"{_T_BACKUP}a_damaged_dump_does_not_pass[cut]",),
    ),
    Guard(
        "a scratch database of somebody else is left alone",
        _RESTORE,
        "if found[0] not in (None, self.mark):",
        "if False:",
        (f"{_T_BACKUP}a_scratch_database_of_somebody_else_is_left_alone",),
    ),
    Guard(
        "an archive of files gets its name only when it was compared with its source",
        _BACKUP,
        "if not compared.proved:",
        "if False:",
        (f"{_T_BACKUP}an_archive_that_is_not_its_source_gets_no_name",),
    ),
    Guard(
        "a dump that failed leaves nothing under its scratch name",
        _BACKUP,
        """\
        return dumps.adopt(run, part, final, known, time.monotonic() - began)
    except BaseException:
        part.unlink(missing_ok=True)
""",
        """\
        return dumps.adopt(run, part, final, known, time.monotonic() - began)
    except BaseException:
""",
        (f"{_T_BACKUP}a_failing_pg_dump_leaves_nothing",),
    ),
    Guard(
        "a backup takes the place of no other file",
        _FILES,
        "final.hardlink_to(part)",
        "part.replace(final)",
        (f"{_T_DURABLE}a_backup_never_takes_the_place_of_another_file",),
    ),
    Guard(
        "a backup under its name is hashed again before it is taken for done",
        _FILES,
        "proof = _proof(final, sha256_file(final))",
        'proof = next(iter(final.parent.glob(f"{final.name}.*.json")), final)',
        (f"{_T_DURABLE}a_backup_that_is_not_what_was_proved_is_not_taken_for_it",),
    ),
    Guard(
        "source, local and off-site hashes are compared",
        _BACKUP,
        "        if not equal:\n",
        "        if False:\n",
        (f"{_T_BACKUP}a_local_file_that_differs_closes_the_gate",),
    ),
    Guard(
        "an old dump does not stand",
        _BACKUP,
        "if unequal or age_s > run.params.backup.max_age_s:",
        "if unequal:",
        (f"{_T_BACKUP}an_old_dump_does_not_stand",),
    ),
    Guard(
        "a file that changed on disk is not copied off site",
        _OBJECTS,
        "    if found != sha256:\n",
        "    if False:\n",
        (f"{_T_OBJECTS}a_file_that_changed_on_disk_is_not_stored[in parts]",),
    ),
    Guard(
        "the store itself refuses a key that is taken",
        _OBJECTS,
        '                Metadata={"sha256": sha256},\n                IfNoneMatch="*",\n',
        '                Metadata={"sha256": sha256},\n',
        (f"{_T_OBJECTS}of_two_that_put_at_once_the_store_takes_one[True]",),
    ),
    Guard(
        "the store itself refuses a key that is taken, for a copy in parts",
        _UPLOADS,
        '            IfNoneMatch="*",\n',
        "",
        (f"{_T_OBJECTS}of_two_that_put_at_once_the_store_takes_one[False]",),
    ),
    Guard(
        "what was sent ahead counts while the file still holds just that",
        _UPLOADS,
        "known is not None and known.checksum == checksum",
        "known is not None",
        (f"{_T_UPLOADS}a_head_that_is_rewritten_after_it_was_sent_is_sent_again",),
    ),
    Guard(
        "nobody completes an upload that another may still write to",
        _UPLOADS,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        (f"{_T_UPLOADS}a_store_that_never_answers_is_not_waited_for_and_its_upload_is_left_to_nobody",),
    ),
    Guard(
        "a copy that does not say what it holds is read before it is taken for done",
        _OBJECTS,
        "(stored.sha256 or self.read_back(stored)[0]) == sha256",
        "stored.sha256 in (None, sha256)",
        (f"{_T_UPLOADS}other_content_of_the_same_size_is_not_taken_for_it",),
    ),
    Guard(
        "what was sent ahead and is of no use is removed",
        _OBJECTS,
        '            self._forget_half_uploads(parts.name, but=begun.upload if begun is not None else "")\n',
        "",
        (f"{_T_UPLOADS}without_its_note_or_its_upload_the_whole_file_is_put[nothing, it became small]",),
    ),
    Guard(
        "an off-site copy is read back and compared",
        _OFF_SITE,
        "    if found != digest:\n",
        "    if False:\n",
        (f"{_T_BACKUP}a_copy_that_comes_back_as_something_else_is_no_copy",),
    ),
    Guard(
        "an off-site copy is under the key that the params name",
        _OFF_SITE,
        '    if wanted.kms_key is not None and wanted.kms_key not in (known, re.split("[:/]", known)[-1]):\n',
        "    if False:\n",
        (f"{_T_OBJECTS}a_copy_under_another_key_of_the_key_server_does_not_count",),
    ),
    Guard(
        "an off-site copy is retained as long as the params ask",
        _OFF_SITE,
        "    if datetime.fromisoformat(stored.retained_until) < least - _CLOCKS_DIFFER:\n",
        "    if False:\n",
        (f"{_T_OBJECTS}what_is_retained_cannot_be_removed",),
    ),
    Guard(
        "a run's folder comes from the store byte for byte, or not at all",
        _MIRROR,
        "if sha256(content) != digest:",
        "if False:",
        (f"{_T_MIRROR}a_file_that_comes_back_as_something_else_is_not_taken",),
    ),
    Guard(
        "nothing that comes from the store lands outside of the run's folder",
        _MIRROR,
        "if not target.resolve().is_relative_to(folder.resolve()):",
        "if False:",
        (f"{_T_MIRROR}no_file_lands_outside_of_the_runs_folder",),
    ),
)

_CHANGED = f"{_T_ARCHIVE}a_change_that_stands_in_sha256sums_too_is_seen"
_RECORDS = (
    Guard(
        "a record is not sealed with a key that nobody trusts",
        _SEAL,
        "    signatures.verify(\n        statement,\n        signature,\n",
        "    dict(\n        statement=statement,\n        signature=signature,\n",
        (f"{_T_ARCHIVE}a_recorder_that_nobody_trusts_does_not_seal",),
    ),
    Guard(
        "a sealed record is never written to again",
        _SEAL,
        "    if not (folder / SIGNATURE).exists():\n        if not state.ended",
        "    if True:\n        if not state.ended",
        (f"{_T_ARCHIVE}a_changed_record_is_neither_overwritten_nor_accepted_by_a_second_seal",),
    ),
    Guard(
        "verify: the recorder signed the statement",
        _VERIFY,
        "    signatures.verify(\n        data, signature, principal",
        "    dict(\n        data=data, signature=signature, principal",
        (f"{_T_ARCHIVE}a_statement_that_a_stranger_signed_does_not_hold",),
    ),
    Guard(
        "verify: every file has the SHA-256 that was signed",
        _VERIFY,
        "elif actual[path] != signed[path]:",
        "elif False:",
        (f"{_CHANGED}[changed]",),
    ),
    Guard(
        "verify: no file was added",
        _VERIFY,
        "elif path not in signed:",
        "elif path not in signed and False:",
        (f"{_CHANGED}[added]",),
    ),
    Guard(
        "verify: no file is missing",
        _VERIFY,
        '                found.wrong(name, prefix + path, "is missing")\n',
        "                pass\n",
        (f"{_CHANGED}[removed]",),
    ),
    Guard(
        "verify: SHA256SUMS lists the files that are there",
        _VERIFY,
        "if tree.read(SUMS) != sums(",
        "if False and tree.read(SUMS) != sums(",
        (f"{_T_ARCHIVE}even_the_recorder_cannot_leave_a_file_out_of_sha256sums",),
    ),
    Guard(
        "verify: each decision was signed by its person",
        _VERIFY_DECISIONS,
        "        signatures.verify(\n            data,\n            signature,\n",
        "        dict(\n            data=data,\n            signature=signature,\n",
        (f"{_T_ARCHIVE}one_person_cannot_sign_as_another",),
    ),
    Guard(
        "verify: each decision is of its round, nonce and ledger head",
        _VERIFY_DECISIONS,
        "if said[key] != known:",
        "if False:",
        (f"{_T_ARCHIVE}a_decision_for_something_else_or_by_somebody_else_does_not_stand",),
    ),
    Guard(
        "verify: who decided held the role",
        _VERIFY_DECISIONS,
        'if role not in asked["roles"] or role not in self.params["people"][person]["roles"]:',
        "if False:",
        (f"{_T_ARCHIVE}a_decision_for_something_else_or_by_somebody_else_does_not_stand",),
    ),
    Guard(
        "verify: who opened the run did not approve it",
        _VERIFY_DECISIONS,
        'if said["decision"] == "approve" and person == self.state.opened["opened_by"]:',
        "if False:",
        (f"{_T_ARCHIVE}who_opened_the_run_cannot_approve_it_whatever_their_role",),
    ),
    Guard(
        "verify: the evidence is what was signed",
        _VERIFY_DECISIONS,
        "if not old and self.tree.digests.get(name) != known:",
        "if False:",
        (f"{_T_ARCHIVE}even_the_recorder_cannot_change_the_evidence_after_the_decision",),
    ),
    Guard(
        "verify: no step behind a gate began before it was green",
        _VERIFY_DECISIONS,
        "if phase in phases and (seq is None or seq > event.seq):",
        "if False:",
        (f"{_T_ARCHIVE}a_step_behind_a_gate_that_nobody_approved_is_seen",),
    ),
)

_INVARIANTS = (
    Guard(
        "fsck: the chain is unbroken",
        _FSCK,
        "    check_chain(events)\n",
        "",
        (f"{_T_FSCK}any_changed_field_breaks_the_chain",),
    ),
    Guard(
        "fsck: a step has one live attempt",
        _FSCK,
        'if known.last in ("intent", "blocked", "green"):',
        "if False:",
        (f"{_TOLD}[a second attempt while the first is open]",),
    ),
    Guard(
        "fsck: an attempt ends once",
        _FSCK,
        'if known.last not in open_for or known.number != data["attempt"]:',
        'if known.number != data["attempt"]:',
        (f"{_TOLD}[a failed attempt that turned green]",),
    ),
    Guard(
        "fsck: an effect is behind its own intent",
        _FSCK,
        'if known.last not in open_for or known.number != data["attempt"]:',
        "if False:",
        tuple(
            f"{_TOLD}[{what}]"
            for what in ("an outcome without its intent", "an effect that nobody meant", "the end of another attempt")
        ),
    ),
    Guard(
        "fsck: a doubt is settled by a signed statement",
        _FSCK,
        'if known.last == "blocked" and not {"statement", "sha256", "signature_sha256"} <= data.keys():',
        "if False:",
        (f"{_TOLD}[a doubt that nobody settled]",),
    ),
    Guard(
        "fsck: a step is green once for the same input",
        _FSCK,
        'if known.last == "green" or again:',
        "if False:",
        (f"{_TOLD}[green twice]", f"{_TOLD}[green again after a reset]"),
    ),
    Guard(
        "fsck: no step starts without its gate",
        _FSCK,
        'if phase in phases and gate not in event.data.get("gates", {}):',
        "if False:",
        (f"{_TOLD}[a step without its gate]",),
    ),
    Guard(
        "fsck: no step starts behind a rejection",
        _FSCK,
        'if (gate, asked["round"]) in story.rejected:',
        "if False:",
        (f"{_TOLD}[a rejection beside the approval]",),
    ),
    Guard(
        "fsck: who opened the run is not in a quorum",
        _FSCK,
        "        standing.discard(story.opened_by)\n",
        "",
        (f"{_TOLD}[an approval by the opener]",),
    ),
    Guard(
        "fsck: a gate's quorum stands, of this round and of different people",
        _FSCK,
        'if len(standing) < max(1, asked["quorum"]):',
        "if False:",
        tuple(
            f"{_TOLD}[{what}]"
            for what in (
                "no approval",
                "one approval of two",
                "an approval of another round",
                "two approvals of one person",
            )
        ),
    ),
    Guard(
        "fsck: no step starts without the run's lease",
        _FSCK,
        'if event.kind == "step_intent" and event.data.get("epoch") == 0:',
        "if False:",
        (f"{_TOLD}[a step of nobody]",),
    ),
    Guard(
        "fsck: a stale executor wrote nothing",
        _FSCK,
        "if epoch < story.epoch:",
        "if False:",
        (f"{_TOLD}[a stale executor wrote]",),
    ),
    Guard(
        "fsck: an epoch was given to somebody",
        _FSCK,
        "if epoch > story.epoch and event.kind not in _LEASES:",
        "if False:",
        (f"{_TOLD}[an epoch that nobody was given]",),
    ),
    Guard(
        "fsck: an epoch was given once",
        _FSCK,
        "if epoch == story.epoch and event.kind in _LEASES:",
        "if False:",
        (f"{_TOLD}[an epoch twice]",),
    ),
    Guard(
        "fsck: a completed run left nothing open",
        _FSCK,
        """if data["state"] == "completed" and left:""",
        "if False:",
        (f"{_TOLD}[complete with a step at work]", f"{_TOLD}[complete with a step in doubt]"),
    ),
    Guard(
        "fsck: nothing begins after the end",
        _FSCK,
        'elif event.kind == "step_intent" and story.ended and data["step"].partition(".")[0] != "review":',
        "elif False:",
        (f"{_TOLD}[a step after the end]",),
    ),
    Guard(
        "fsck: every artifact has its digest",
        _FSCK,
        "if here and sha256_file(file) == digest:",
        "if here:",
        tuple(f"{_T_FSCK}a_file_that_is_gone_or_changed_is_named[{file}.json]" for file in ("dump", "evidence")),
    ),
    Guard(
        "fsck: a statement that was changed is not excused by the ledger's own",
        _FSCK,
        "if (carried and not here) or",
        "if carried or",
        (f"{_T_FSCK}a_statement_that_the_ledger_carries_need_not_be_here_yet",),
    ),
    Guard(
        "fsck: a sealed record has its statements itself",
        _FSCK,
        'carried = "statement_json" in event.data and not (folder / "statement.json.sig").exists()',
        'carried = "statement_json" in event.data',
        (f"{_T_FSCK}a_statement_that_is_gone_from_a_sealed_record_is_named",),
    ),
    Guard(
        "fsck: a ledger did not lose what was sealed of it",
        _FSCK,
        """\
            raise VerificationError(f"the ledger ends with event {len(events)}, sealed are {len(lines)}")
""",
        "            return\n",
        (f"{_T_FSCK}a_ledger_that_lost_what_was_sealed_is_named",),
    ),
    Guard(
        "fsck: what was sealed of a ledger is what it has",
        _FSCK,
        "if line != canonical_json(events[number - 1].as_json()):",
        "if False:",
        (f"{_T_FSCK}a_ledger_that_lost_what_was_sealed_is_named",),
    ),
    Guard(
        "fsck: an environment has one live run",
        _FSCK,
        "if len(holders) < 2 else",
        "if True else",
        (f"{_T_FSCK}an_environment_has_one_live_run",),
    ),
)

GUARDS: tuple[Guard, ...] = (
    *_STEPS,
    *_IN_DOUBT,
    *_DURABLE,
    *_EVENTS,
    *_EXECUTORS,
    *_COMMANDS,
    *_GATES,
    *_MACHINES,
    *_MIGRATIONS,
    *_BACKUPS,
    *_RECORDS,
    *_INVARIANTS,
)
