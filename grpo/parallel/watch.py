"""A rank that died or hangs: noticed by all others, named by each of them, within a stated time.

Ranks wait for each other in every sum. Where one does not come, the others wait for hours, or end with a
broken connection that names nobody. So a thread on each rank tells all other ranks once a second that it is
alive, which meeting (a sum, a barrier) its main thread has reached, and where in the code it is. A rank is
lost when it

    is gone      nobody listens at its port: its process has ended without a word
    fails        it says so, in its last words
    is silent    no word for `timeout` seconds: stopped, or cut off
    is stuck     alive, but another one that was in more meetings has waited for `timeout` seconds, in which
    its own main thread stayed at the same place in the code;
                 one that is slow and moves, in a long rollout or evaluation, is not stuck

Who notices tells the others; each says the same line and ends with status LOST. Words travel by UDP: nothing
in it blocks, and no process in the middle can die, so it needs neither torchrun nor rank 0. No paper has
this; it is plumbing.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

# exit status: sysexits' "temporary failure, try again"
LOST = 75
# seconds between two words of a rank
BEAT = 1.0
# seconds in which a process may still end by itself, with a message of its own, before it ends for another's
# loss
GRACE = 1.0
# seconds that a rank waits for the others to have heard its last words
FAREWELL = 3.0
# seconds from a broken connection in which somebody is found to be lost, or nobody is
BROKEN = 10.0
# ranks named in a line, at most
NAMED = 8
ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class Peer:
    """Another rank, as it is seen from here. Times are of Watch.now."""

    rank: int
    port: int
    host: str
    family: int
    # its last word; 0: none yet
    heard: float = 0.0
    # the last time that it was somewhere else than before
    moved: float = 0.0
    said: dict = field(default_factory=dict)
    # words since then to a port at which nobody listens
    refused: int = 0

    def __post_init__(self):
        self.connect(self.host)

    def connect(self, host: str) -> None:
        """A connected socket hears from the system when nobody listens at the other end."""
        self.host, self.socket = host, socket.socket(self.family, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.connect((host, self.port))

    def tell(self, words: bytes) -> None:
        """Send, or not: what is lost is said again a second later. A refusal is that of the word before."""
        try:
            self.socket.send(words)
        except ConnectionRefusedError:
            self.refused += 1
            with contextlib.suppress(OSError):
                self.socket.send(words)
        except OSError:
            pass

    @property
    def gone(self) -> bool:
        return self.refused >= 2

    def where(self) -> str:
        """Where it was last, in words."""
        if not self.said:
            return "no word ever came from it; does a firewall keep UDP back?"
        return f"{self.said['step']}, in {self.said['place']}" + (
            f", waiting: {self.said['at']}" if self.said["at"] else ""
        )


class Watch:
    """The ranks as one of them sees them; made on all of them together, once there is a process group.
    timeout: seconds."""

    def __init__(self, rank: int, size: int, timeout: float):
        self.rank, self.timeout, self.step = rank, timeout, "before the first step"
        # meetings begun, the one it is in, since when; the one begun last
        self.met, self.name = ((0, "", 0.0), "")
        self.place, self.stack, self.moves, self.moved = "", 0, 0, 0.0
        # last words: "done", or an error
        self.left = ""
        # rank → what is wrong with it
        self.lost: dict[int, str] = {}
        # when this process ends for that
        self.due = 0.0
        # seconds in which this process was stopped; when it heard last, or nothing
        self.slept, self.last = (0.0, time.monotonic())
        self.main = threading.get_ident()
        family, *_, master = socket.getaddrinfo(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
        )[0]
        # sends nothing: it finds this machine's address on the way to rank 0
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(master)
            host = probe.getsockname()[0]
        self.ears = socket.socket(family, socket.SOCK_DGRAM)
        self.ears.bind(("", 0))
        addresses: list = [None] * size
        dist.all_gather_object(addresses, (host, self.ears.getsockname()[1], secrets.token_hex(16)))
        # words without it are not of this run
        self.key = addresses[0][2]
        self.peers = {
            r: Peer(r, port, address, family) for r, (address, port, _) in enumerate(addresses) if r != rank
        }
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    # ---- of the main thread

    @contextlib.contextmanager
    def meeting(self, name: str) -> Iterator[None]:
        """Around what waits for other ranks. A connection that breaks in it is somebody's death: the watch
        then ends this process with a line that names the rank."""
        number, outer, since = self.met
        self.name = name
        self.met = number + 1, name, self.now()
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):
                # here, where SIGTERM is only noted: torchrun sends it as soon as a rank has died
                time.sleep(BROKEN)
            raise
        finally:
            self.met = self.met[0], outer, since

    def leave(self, error: BaseException | None) -> None:
        """End the watch, and let the others know, and with which error."""
        self.left = " ".join(f"{type(error).__name__}: {error}".split()) if error else "done"
        self.thread.join()
        self.ears.close()

    # ---- of the thread

    def run(self) -> None:
        """Tell, hear, judge, once a second; look more often, so that what moves is seen to."""
        while not self.left:
            self.look()
            self.tell()
            until = time.monotonic() + BEAT
            while time.monotonic() < until and not self.left:
                self.hear(BEAT / 10)
                self.look()
            if not self.left:
                self.judge()
        self.farewell(lambda peer: self.rank in peer.said.get("heard", ()))

    def now(self) -> float:
        """Seconds, without those in which this process was stopped: what it slept through is not held
        against the others."""
        return time.monotonic() - self.slept

    def look(self) -> None:
        """Where the main thread is, and whether it has moved."""
        frame, stack = sys._current_frames().get(self.main), []
        while frame is not None:
            stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, frame.f_lasti))
            frame = frame.f_back
        if stack and (seen := hash(tuple(stack))) != self.stack:
            self.stack, self.moves, self.moved = seen, self.moves + 1, self.now()
            file, line, name, _ = next((found for found in stack if found[0].startswith(ROOT)), stack[0])
            self.place = f"{file.removeprefix(ROOT + os.sep)}, line {line} ({name})"

    def tell(self) -> None:
        """A word to everybody."""
        number, at, _ = self.met
        words = {
            "key": self.key,
            "rank": self.rank,
            "meeting": number,
            "at": at,
            "step": self.step,
            "place": self.place,
            "moves": self.moves,
            "left": self.left[:400],
            "heard": [r for r, peer in self.peers.items() if peer.said.get("left")],
            "lost": {r: why[:200] for r, why in list(self.lost.items())[:NAMED]},
        }
        for peer in self.peers.values():
            peer.tell(json.dumps(words).encode())

    def hear(self, seconds: float) -> None:
        """Hear one word, if one comes within so many seconds. Last words are answered at once."""
        try:
            self.ears.settimeout(seconds)
            words, address = self.ears.recvfrom(1 << 16)
            said = json.loads(words)
            peer = self.peers[said["rank"]] if said["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            peer = None
        pause, self.last = time.monotonic() - self.last, time.monotonic()
        if pause > 3 * BEAT:
            self.slept += pause
        if peer is None:
            return
        # it is not where it said it would be: several networks
        if address[0] != peer.host:
            peer.connect(address[0])
        parting = said["left"] and not peer.said.get("left")
        if (said["meeting"], said["moves"]) != (peer.said.get("meeting"), peer.said.get("moves")):
            peer.moved = self.now()
        peer.heard, peer.refused, peer.said = self.now(), 0, said
        if said["lost"]:
            self.lose({int(r): why for r, why in said["lost"].items()})
        if parting:
            self.tell()

    def judge(self) -> None:
        """Is somebody lost?  Ends the process if so."""
        now, (number, at, since) = self.now(), self.met
        there = [peer for peer in self.peers.values() if peer.said.get("left") != "done"]
        found = {}
        for peer in there:
            if peer.said.get("left"):
                found[peer.rank] = f"ended with an error ({peer.where()}): {peer.said['left']}"
            elif peer.gone:
                found[peer.rank] = f"is gone: its process ended without a word ({peer.where()})"
            elif peer.heard and now - peer.heard > self.timeout:
                found[peer.rank] = f"has given no sign of life for {self.timeout:g} seconds ({peer.where()})"
        # it waits; also after a meeting: NCCL's end when the result is looked at
        if not found and now - (since if at else self.moved) > self.timeout:
            still = [peer for peer in there if now - peer.moved > self.timeout]
            behind = [
                peer for peer in still if peer.said and peer.said["meeting"] < number and not peer.said["at"]
            ]
            found = {
                peer.rank: f"has not come to {self.name!r} and has not moved for {self.timeout:g} seconds "
                f"({peer.where()})"
                for peer in behind
            }
            ahead = [peer for peer in there if peer.said.get("meeting", 0) > number and not at]
            if not found and not ahead and len(still) == len(there):
                found = {
                    peer.rank: f"has not moved for {self.timeout:g} seconds, nor has anybody else "
                    f"({peer.where()})"
                    for peer in still
                }
        if found:
            self.lose(found)
        if self.lost and now >= self.due:
            self.end()

    def lose(self, lost: dict[int, str]) -> None:
        """Note who is lost; the first to notice decides for all."""
        if not self.lost:
            self.lost, self.due = lost, self.now() + GRACE

    def end(self) -> None:
        """Say who is lost, see to it that the others know, and end this process, whatever its main thread
        is waiting for."""
        who = "; ".join(f"rank {r} {why}" for r, why in list(self.lost.items())[:NAMED])
        print(
            f"\ntrain.py: on rank {self.rank}: {who}. The run cannot go on without it; the same command "
            "goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self.rank in self.lost and (frame := sys._current_frames().get(self.main)):
            print(
                f"rank {self.rank} is here:\n{''.join(traceback.format_stack(frame))}",
                file=sys.stderr,
                flush=True,
            )
        self.farewell(lambda peer: peer.rank in self.lost or peer.said.get("lost"))
        sys.stdout.flush()
        os._exit(LOST)

    def farewell(self, heard) -> None:
        """Repeat the last words until everybody who is there has heard them, for some seconds at most."""
        until = time.monotonic() + FAREWELL
        while time.monotonic() < until:
            self.tell()
            if all(heard(peer) or peer.gone or peer.said.get("left") for peer in self.peers.values()):
                return
            self.hear(0.05)
