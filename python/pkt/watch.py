"""How the processes of a run notice that one of them is gone.

No timeout of a collective could tell it, since an honest process may be busy with a layer for an
hour. So each says every few seconds that it lives, in the store where all met; one that was killed,
stopped or cut off is missed within a minute. Time is counted in beats of our own, not by the clock:
a whole run may be stopped for a while.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from typing import Any

from pkt.errors import PktError

BEAT_SECONDS = 5.0
MISSED_BEATS = 8  # in a row: 40 s of silence
MEET_SECONDS = 1800.0  # one host may still be fetching a model
LEFT = "pkt/left/{}"  # in the store, of a process that has failed
UNREACHABLE = "the host where the processes met cannot be reached any more"


class Watch:
    """What this process hears of the others, by way of the store in which they met."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(count) if other != rank]
        self._count = count
        self._ended = threading.Event()
        self._rounds = 0  # of listening
        self.lost: str | None = None  #: who is gone, and how it was noticed

    def meet(self) -> None:
        """Return when all have come; begin to say and to hear that they live."""
        ours = self._store.clone()
        self._beat(ours, 0)
        since = time.monotonic()
        while away := self._away(ours):
            if time.monotonic() - since > MEET_SECONDS:
                raise PktError(
                    f"{self._name(away[0])} has not come within {MEET_SECONDS:.0f} s",
                    "its own messages say why; then start all again",
                )
            time.sleep(0.05)
        for name, target in (("pkt-beat", self._listen), ("pkt-guard", self._guard)):
            threading.Thread(target=target, args=(ours,), name=name, daemon=True).start()

    def loss(self, error: BaseException | None = None) -> str:
        """One line on why the others cannot be waited for any longer."""
        if self.lost:
            return self.lost
        with contextlib.suppress(RuntimeError):
            if left := self._left(self._store):
                return left
        reason = str(error).splitlines()[0] if error else "no reason is known"
        return f"another of the {self._count} processes has ended or cannot be reached: {reason}"

    def leave(self) -> None:
        """Tell the others that this process has failed."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            if not self.lost:
                self._store.set(LEFT.format(self._rank), "1")

    def part(self) -> None:
        """Return when no process waits for another any more, or one is gone.

        A connection that is closed may fail a collective that has just ended on the other side,
        and the first process may hold the store itself.
        """
        awaited = self._others if self._rank == 0 else [0]
        with contextlib.suppress(RuntimeError):
            if self._rank:
                self._store.set(f"pkt/done/{self._rank}", "1")
            done = [f"pkt/done/{each}" for each in awaited]
            while not (self.lost or self._store.check(done)):
                time.sleep(0.01)
            if self._rank == 0:
                self._store.set("pkt/done/0", "1")
        self._ended.set()

    def _listen(self, store: Any) -> None:
        """Say that this process lives, hear of the others."""
        heard, missed = dict.fromkeys(self._others, b""), dict.fromkeys(self._others, 0)
        store.set_timeout(datetime.timedelta(seconds=2 * BEAT_SECONDS))
        while not self.lost and not self._ended.wait(BEAT_SECONDS):
            self._rounds += 1
            try:
                self._beat(store, self._rounds)
                for other in self._others:
                    said = store.get(f"pkt/beat/{other}")
                    missed[other] = missed[other] + 1 if said == heard[other] else 0
                    heard[other] = said
                self.lost = self.lost or self._left(store)
            except RuntimeError:
                self.lost = UNREACHABLE
            for other in self._others:
                if missed[other] >= MISSED_BEATS and not self.lost:
                    seconds = MISSED_BEATS * BEAT_SECONDS
                    self.lost = f"{self._name(other)} has not been heard of for {seconds:.0f} s"

    def _guard(self, _: Any) -> None:
        """Where the network is cut, listening itself hangs: it is missed as a process would be."""
        seen, missed = self._rounds, 0
        while not self.lost and not self._ended.wait(BEAT_SECONDS):
            missed = missed + 1 if self._rounds == seen else 0
            seen = self._rounds
            if missed >= MISSED_BEATS:
                self.lost = UNREACHABLE

    def _left(self, store: Any) -> str | None:
        for other in self._others:
            if store.check([LEFT.format(other)]):
                return f"{self._name(other)} has ended with an error, which it prints itself"
        return None

    def _away(self, store: Any) -> list[int]:
        """Who has not come yet, while all may still come."""
        try:
            if left := self._left(store):
                raise PktError(left, "once that is mended, start all again")
            return [other for other in self._others if not store.check([f"pkt/beat/{other}"])]
        except RuntimeError as error:
            raise PktError(UNREACHABLE, "its own messages say why; then start all again") from error

    def _beat(self, store: Any, number: int) -> None:
        store.set(f"pkt/beat/{self._rank}", str(number))

    def _name(self, rank: int) -> str:
        return f"process {rank} (of 0 to {self._count - 1})"
