"""Ranks that are killed, stopped, or fail, and what the others say of them."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from glm_hf.training.pipeline import heartbeat as module
from glm_hf.training.pipeline.heartbeat import Board, Heartbeat, Silence, is_communication_error, is_gone

MOST_SECONDS = 25.0  # of the detection on a busy machine, less than any timeout of gloo or patience below
PATIENT = {"interval": 0.2, "patience": 60.0}  # by which nobody is named for silence


@dataclass
class Rank:
    """A process that has ended: what was printed or raised, and the name that others should give it."""

    name: str
    status: int
    text: str


def rank_main(body: Callable[[int], None], rank: int, world_size: int, port: int, options: dict) -> None:
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), **addresses}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    with Heartbeat(rank, world_size, **options):
        dist.barrier()
        body(rank)


def start_rank(file: Path, *arguments) -> int:
    """Fork a process with stderr in a file; its status is 0, or 3 after an error, which it prints."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 3
    try:
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
        rank_main(*arguments)
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def run_ranks(
    body: Callable[[int], None], folder: Path, world_size: int = 3, victim: int = -1, **options
) -> list[Rank]:
    """Run `body(rank)` under a heartbeat; a victim that does not end is killed once the others have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    pids = [start_rank(file, body, rank, world_size, port, options) for rank, file in enumerate(files)]
    order = sorted(range(world_size), key=lambda rank: rank == victim)
    deadline = time.monotonic() + MOST_SECONDS
    statuses = {}
    for rank in order:
        while not (ended := os.waitpid(pids[rank], os.WNOHANG))[0] and time.monotonic() < deadline and rank != victim:
            time.sleep(0.02)
        if not ended[0]:
            os.kill(pids[rank], signal.SIGKILL)
            ended = os.waitpid(pids[rank], 0)
        statuses[rank] = os.waitstatus_to_exitcode(ended[1])
    names = [f"rank {rank} (host {socket.gethostname()}, pid {pid})" for rank, pid in enumerate(pids)]
    return [Rank(names[rank], statuses[rank], files[rank].read_text()) for rank in range(world_size)]


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.5)


def all_reduce_forever() -> None:
    while True:
        dist.all_reduce(torch.ones(4))
        time.sleep(0.01)


def assert_raised(rank: Rank, verdict: str) -> None:
    assert f"ConnectionError: {verdict}; the run ends here\n" in rank.text
    assert rank.status == 3


def assert_told(rank: Rank, verdict: str) -> None:
    """Of two that hang, one may end first, by which the other's body fails."""
    assert f"{verdict}; the run ends here\n" in rank.text
    assert rank.status in (1, 3)


def assert_ended(rank: Rank, verdict: str) -> None:
    assert f"glm-hf: error: {verdict}; the run ends here\n" in rank.text
    assert rank.status == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_named(tmp_path, victim):
    """Rank 0 takes the store with it."""

    def body(rank: int) -> None:
        if rank == victim:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        all_reduce_forever()

    ranks = run_ranks(body, tmp_path, **PATIENT)
    assert ranks[victim].status == -signal.SIGKILL
    for rank in range(3):
        if rank != victim:
            assert_raised(ranks[rank], f"{ranks[victim].name} has stopped answering")


@pytest.mark.parametrize("victim", [0, 1])
def test_the_error_of_one_rank_is_told_by_all(tmp_path, victim):
    def body(rank: int) -> None:
        if rank == victim:
            time.sleep(0.5)
            raise ValueError("a text\nof two lines")
        all_reduce_forever()

    ranks = run_ranks(body, tmp_path, **PATIENT)
    assert ranks[victim].text.endswith("ValueError: a text\nof two lines\n")
    for rank in range(3):
        if rank != victim:
            assert_told(ranks[rank], f"{ranks[victim].name} has failed: ValueError: a text of two lines")


def test_an_error_of_communication_without_a_dead_rank_stays(tmp_path, short_grace):
    def body(rank: int) -> None:
        if rank == 1:
            raise RuntimeError("gloo: out of buffers")
        time.sleep(60)

    ranks = run_ranks(body, tmp_path, world_size=2, interval=0.1, patience=1.0)
    assert ranks[1].text.endswith("RuntimeError: gloo: out of buffers\n")
    assert_ended(ranks[0], f"{ranks[1].name} has failed: RuntimeError: gloo: out of buffers")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_is_named(tmp_path, short_grace, victim):
    """Its connections stay open, and so the others hang; those of rank 0 hang in the store, too."""

    def body(rank: int) -> None:
        if rank == victim:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
        all_reduce_forever()

    ranks = run_ranks(body, tmp_path, victim=victim, interval=0.2, patience=2.0)
    launcher = ", or the process that launched the run," if victim == 0 else ""
    for rank in range(3):
        if rank != victim:
            assert_told(ranks[rank], f"{ranks[victim].name}{launcher} has stopped answering")


def test_ranks_that_wait_for_one_that_lives_end_by_themselves(tmp_path, short_grace):
    def body(rank: int) -> None:
        if rank == 2:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            time.sleep(60)
        dist.recv(torch.ones(4), src=1)

    ranks = run_ranks(body, tmp_path, **PATIENT)
    for rank in ranks[:2]:
        assert_told(rank, f"{ranks[2].name} has stopped answering")


def test_ranks_that_are_done_raise_no_alarm(tmp_path):
    """Rank 0 waits for the others, as it keeps the store."""

    def body(rank: int) -> None:
        if rank == 2:
            time.sleep(3)

    assert [rank.status for rank in run_ranks(body, tmp_path, interval=0.2, patience=2.0)] == [0, 0, 0]


def test_a_rank_that_is_killed_after_others_are_done_is_named(tmp_path):
    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

    ranks = run_ranks(body, tmp_path, **PATIENT)
    assert_raised(ranks[0], f"{ranks[1].name} has stopped answering")
    assert ranks[2].status == 0


def test_a_rank_that_holds_the_lock_for_less_than_patience_raises_no_alarm(tmp_path):
    def body(rank: int) -> None:
        if rank == 1:
            sys.setswitchinterval(60)
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                pass
            sys.setswitchinterval(0.005)
        dist.barrier()

    assert [rank.status for rank in run_ranks(body, tmp_path, interval=0.2, patience=8.0)] == [0, 0, 0]


def test_one_heartbeat_follows_another(tmp_path):
    def body(rank: int) -> None:
        for _ in range(3):
            with Heartbeat(rank, 2, **PATIENT):
                dist.barrier()

    assert [rank.status for rank in run_ranks(body, tmp_path, world_size=2, **PATIENT)] == [0, 0]


def test_the_store_outlives_the_process_group(tmp_path):
    def body(rank: int) -> None:
        dist.destroy_process_group()
        time.sleep(0.5)

    assert [rank.status for rank in run_ranks(body, tmp_path, world_size=2, **PATIENT)] == [0, 0]


def test_one_process_is_not_watched():
    with pytest.raises(RuntimeError, match="gloo"), Heartbeat(0, 1):
        raise RuntimeError("gloo")
    with Heartbeat(0, 2) as heartbeat:
        assert heartbeat.verdict is None


def test_the_first_verdict_stays():
    store = dist.HashStore()
    first, second = Board(store, 0, 2), Board(store, 1, 2)
    assert first.look().verdict == ""
    assert [first.decide("one"), second.decide("two")] == ["one", "one"]
    assert second.look().verdict == "one"


def test_a_rank_is_settled_once_and_anew_in_the_next_heartbeat():
    store = dist.HashStore()
    boards = Board(store, 0, 2), Board(store, 1, 2)
    for _ in range(2):
        boards[0].settle(1)
    boards[1].leave()
    assert boards[0].look().settled == 1
    assert boards[0].look().beats == {1: -1}
    later = Board(store, 0, 2), Board(store, 1, 2)
    assert later[0].look().settled == 0
    assert later[0].look().beats == {1: 1}


def test_silence_counts_while_the_listener_listens():
    silence = Silence(longest_step=4.0)
    start = silence.heard
    beats = {1: 7, 2: 7, 3: 0, 4: -1}
    for look in range(1, 7):
        beats[2] += 1
        silence.hear(beats, start + 2.0 * look)
    assert silence.seconds == {1: 10.0, 2: 0.0, 3: 0.0, 4: 0.0}
    silence.hear(beats, start + 1000.0)  # the listener was paused
    assert silence.seconds == {1: 14.0, 2: 4.0, 3: 0.0, 4: 0.0}
    assert silence.longest(14.0) == [1]
    assert silence.longest(14.1) == []


def test_ranks_that_fall_silent_together_are_named_together():
    silence = Silence(longest_step=4.0)
    start = silence.heard
    for look in range(1, 9):
        silence.hear({1: 5, 2: max(5, 7 - look), 3: look}, start + 2.0 * look)
    assert silence.longest(14.0) == [1, 2]


def test_errors_of_communication_are_told_by_their_causes():
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    wrapped = OSError("the checkpoint cannot be saved")
    wrapped.__cause__ = gloo
    assert all(map(is_communication_error, (gloo, wrapped, dist.DistBackendError("NCCL"))))
    assert not any(map(is_communication_error, (None, ValueError("gloo"), RuntimeError("out of memory"))))


def test_a_process_that_nobody_has_waited_for_is_gone():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(pid)
    os.waitpid(pid, 0)
    assert is_gone(pid)
    assert not is_gone(os.getpid())
