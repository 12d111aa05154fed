"""From a ClientApp's process to the resident worker and back: the door, who may come, and when it closes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from sam_ds.config import RunConfig, flatten
from sam_ds.errors import InputError
from sam_ds.federation.grid import Mailbox, TaskQueue, identify, serve
from sam_ds.federation.supernode import relay as module
from sam_ds.federation.supernode import resident, resident_rank
from sam_ds.federation.supernode.config import identity
from sam_ds.federation.supernode.door import Door
from sam_ds.federation.supernode.relay import WorkerDied, connect, private_folder, relay, stop

ROOT = Path(__file__).resolve().parent.parent


class Alone:
    """A worker group of one, in a thread: its ranks do not matter."""

    ranks = (0,)
    position = 0


class Resident:
    """A worker in threads of this process: a door, and as many ranks as it has pods; `config` is the run's."""

    def __init__(self, folder, config, pods=1, **door):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        self.door = Door(folder, identity(config, ()), TaskQueue(Mailbox(store), pods), lambda tier: 1,
                         **{"owner": None, "idle_seconds": 60.0} | door)  # fmt: skip
        self.threads = []
        for _ in range(pods):
            handle = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=30))
            work = (Mailbox(handle), resident_rank.answer, Alone(), {1: Alone()})
            self.threads.append(threading.Thread(target=serve, args=work, daemon=True))
        self.closer = threading.Thread(target=self._close, daemon=True)
        for thread in (*self.threads, self.closer):
            thread.start()

    def _close(self):
        for thread in self.threads:
            thread.join()
        self.door.close()

    def left(self, seconds=10.0):
        self.closer.join(seconds)
        return not self.closer.is_alive()


@pytest.fixture
def app(monkeypatch):
    """The ClientApp of a worker counts in its context, adds `number`, and fails when asked for 13."""
    counting = ClientApp()

    @counting.train()
    def answer(message, context):
        number = message.content["task"]["number"]
        if number == 13:
            raise RuntimeError("out of memory")
        if number == 14:
            answer.busy.set()
            assert answer.release.wait(20)
        count = (context.state["count"]["n"] if "count" in context.state else 0) + 1
        context.state["count"] = ConfigRecord({"n": count})
        return Message(RecordDict({"out": ConfigRecord({"sum": count + number})}), reply_to=message)

    answer.busy, answer.release = threading.Event(), threading.Event()
    monkeypatch.setattr(resident_rank, "client_app", counting)
    identify(0)
    return answer


@pytest.fixture
def folder(tmp_path):
    # Short enough for a socket, whatever the test is called.
    home = Path("/proc/self/fd") / str(os.open(tmp_path, os.O_RDONLY)) / "w"
    yield private_folder(str(home))
    os.close(int(home.parent.name))


def context(folder, client=0, run=None, **node):
    return Context(run_id=7, node_id=99, node_config={"partition-id": client, "worker": str(folder)} | node,
                   state=RecordDict(), run_config=flatten(run or RunConfig()))  # fmt: skip


def message(number, tier="small"):
    content = RecordDict({"task": ConfigRecord({"number": number, "tier": tier})})
    made = Message(content, 99, "train", group_id="1")
    made.metadata.__dict__["_message_id"] = f"m{number}"
    return made


def test_replies_and_state_come_back(app, folder):
    worker, ours, theirs = Resident(folder, RunConfig()), context(folder), context(folder, client=1)
    assert [relay(message(n), ours).content["out"]["sum"] for n in (10, 20)] == [11, 22]
    assert relay(message(30), theirs).content["out"]["sum"] == 31
    assert ours.state["count"]["n"] == 2 and theirs.state["count"]["n"] == 1
    reply = relay(message(5), ours)
    assert reply.metadata.reply_to_message_id == "m5" and reply.metadata.src_node_id == 99
    assert stop(folder) and worker.left()
    assert connect(folder) is None and not stop(folder)


def test_an_exception_becomes_an_error_reply_and_the_worker_stays(app, folder):
    worker, ours = Resident(folder, RunConfig()), context(folder)
    failed = relay(message(13), ours)
    assert failed.has_error() and "out of memory" in failed.error.reason
    assert relay(message(1), ours).content["out"]["sum"] == 2
    stop(folder)
    assert worker.left()


def test_nodes_of_one_machine_share_a_worker_at_the_same_time(app, folder):
    worker, sums = Resident(folder, RunConfig(), pods=2), []
    slow = threading.Thread(target=lambda: sums.append(relay(message(14), context(folder)).content["out"]["sum"]))
    slow.start()
    assert app.busy.wait(20)
    assert relay(message(1), context(folder, client=1)).content["out"]["sum"] == 2
    assert not sums
    app.release.set()
    slow.join(20)
    assert sums == [15]
    stop(folder)
    assert worker.left()


def test_a_worker_of_another_run_answers_what_it_has_begun_and_makes_room(app, folder, monkeypatch):
    first, other, started, sums = Resident(folder, RunConfig()), RunConfig(seed=1), [], []

    def start(where, config, node):
        assert connect(folder) is None
        started.append(Resident(where, config))
        return connect(where)

    monkeypatch.setattr(module, "_start", start)
    slow = threading.Thread(target=lambda: sums.append(relay(message(14), context(folder)).content["out"]["sum"]))
    slow.start()
    assert app.busy.wait(20)
    release = threading.Timer(0.5, app.release.set)
    release.start()
    assert relay(message(1), context(folder, run=other)).content["out"]["sum"] == 2
    slow.join(20)
    assert sums == [15] and first.left() and len(started) == 1
    # Nothing is started for a run that has its worker.
    assert relay(message(2), context(folder, run=other)).content["out"]["sum"] == 3
    assert len(started) == 1
    stop(folder)
    assert started[0].left()


def test_a_worker_that_dies_is_an_error_by_name_and_the_next_message_starts_another(app, folder, monkeypatch):
    class Dying(Resident):
        def __init__(self, *args):
            super().__init__(*args)
            self.door._reply = lambda identity: (_ for _ in ()).throw(OSError("killed"))

    doors = [Dying, Resident]
    workers = []

    def start(where, config, node):
        workers.append(doors.pop(0)(where, config))
        (where / module.LOG).write_text("rank 1: CUDA out of memory\n")
        return connect(where)

    monkeypatch.setattr(module, "_start", start)
    with pytest.raises(WorkerDied, match="(?s)ended before it had answered.*CUDA out of memory"):
        relay(message(1), context(folder))
    stop(folder)
    assert workers[0].left()
    assert relay(message(1), context(folder)).content["out"]["sum"] == 2
    stop(folder)
    assert workers[1].left()


def test_the_worker_ends_with_its_owner(app, folder):
    owner = subprocess.Popen(["sleep", "60"])
    worker = Resident(folder, RunConfig(), owner=owner.pid)
    relay(message(1), context(folder))
    assert not worker.left(0.5)
    owner.kill()
    assert worker.left()
    owner.wait()


def test_the_worker_ends_when_nobody_comes(app, folder):
    worker = Resident(folder, RunConfig(), idle_seconds=0.5)
    relay(message(1), context(folder))
    assert worker.left()


def test_the_socket_is_its_users_alone(app, folder, tmp_path):
    worker = Resident(folder, RunConfig())
    assert (folder / module.SOCKET).stat().st_mode & 0o777 == 0o600
    stop(folder)
    assert worker.left()
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    with pytest.raises(InputError, match="chmod 700"):
        relay(message(1), context(open_to_all))
    with pytest.raises(InputError, match="too long a path"):
        private_folder(str(tmp_path / ("x" * 100)))


def test_a_node_that_is_set_up_wrongly(folder):
    def refused(node_config, asked):
        ours = context(folder)
        ours.node_config = node_config
        with pytest.raises(InputError) as caught:
            relay(asked, ours)
        return str(caught.value)

    assert "start it with --node-config 'partition-id=0'" in refused({}, message(1))
    assert "did you mean 'tiers'?" in refused({"partition-id": 0, "tier": "small"}, message(1))
    assert "partition_id must be >= 0" in refused({"partition-id": -1}, message(1))
    assert "has 'huge'; the run's are small" in refused({"partition-id": 0, "tiers": "huge"}, message(1))
    assert "client 0 is of the tier large" in refused({"partition-id": 0, "tiers": "small,medium"}, message(1, "large"))
    asked = Message(RecordDict({"task": ConfigRecord({"trains": "full"})}), 99, "query")
    assert "partition-id = 8 is none of the run's 8 clients" in refused({"partition-id": 8}, asked)
    assert "client 1 is of the tier medium" in refused({"partition-id": 1, "tiers": "small"}, asked)


def test_a_node_may_have_its_own_folders(app, folder):
    here = RunConfig(out="/elsewhere/run", data="/elsewhere/text")
    worker = Resident(folder, here)
    assert relay(message(1), context(folder, out=here.out, data=here.data)).content["out"]["sum"] == 2
    stop(folder)
    assert worker.left()


def test_a_worker_without_a_base_model(folder, tmp_path, capsys):
    (folder / "config.toml").write_text(f'out = "{tmp_path}/run"\n')
    assert resident.main(["--config", str(folder / "config.toml"), "--worker", str(folder)]) == 2
    assert f"there is no base model in {tmp_path}/run/base" in capsys.readouterr().err
    assert resident.main(["--worker", str(folder), "--stop"]) == 0
    assert "there is no worker in" in capsys.readouterr().out


def test_a_start_that_fails_says_why(folder, tmp_path, monkeypatch):
    """The launcher's place is taken by a program that ends as it does for bad input."""
    launcher = tmp_path / "python"
    launcher.write_text("#!/bin/sh\necho 'client_worker: there is no base model'\nexit 2\n")
    launcher.chmod(0o700)
    monkeypatch.setattr(module.sys, "executable", str(launcher))
    with pytest.raises(WorkerDied, match="(?s)exit code 2.*there is no base model"):
        relay(message(1), context(folder))


def test_a_process_that_only_relays_loads_no_torch():
    program = ("import sys, sam_ds.federation.apps, sam_ds.federation.supernode.relay\n"
               "print(*({'torch', 'transformers', 'deepspeed', 'scipy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout.split(), (done.stdout, done.stderr)
