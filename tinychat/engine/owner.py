"""One thread owns the engine; any other thread, or event loop, hands requests in and reads its answer as it comes."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from types import TracebackType

from tinychat.core import Event, Failed, Finished, Request
from tinychat.engine.scheduler import Scheduler
from tinychat.errors import CapacityError, TinychatError, UsageError

STOPPED = CapacityError("the engine has stopped", "start it again")


class Stream:
    """One request's events, for one reader: a plain or an asynchronous iterator. The last one is Finished or Failed.

    A reader that stops before that cancels the answer.
    """

    def __init__(self, request: Request, cancel: Callable[[str], None]) -> None:
        self.request = request
        self.ended = False
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self.ended:
                yield self._next()
        finally:
            self._leave()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while not self.ended:
                arrived.clear()
                while not (self.ended or self._events.empty()):
                    yield self._next()
                if not self.ended:
                    await arrived.wait()
        finally:
            self._wake = None
            self._leave()

    def _next(self) -> Event:
        event = self._events.get()
        self.ended = isinstance(event, Finished | Failed)
        return event

    def _leave(self) -> None:
        if not self.ended:
            self.cancel()

    def cancel(self) -> None:
        """End the answer after its current token."""
        self._cancel(self.request.id)

    def put(self, event: Event) -> None:
        """What the owner says."""
        self._events.put(event)
        if (wake := self._wake) is not None:
            with suppress(RuntimeError):  # its event loop is closed: nobody reads
                wake()


class Owner:
    """The thread that steps a scheduler while there is something to do. Use it in `with`, or call `close`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.failure: BaseException | None = None
        self._inbox: deque[Stream] = deque()
        self._cancelled: set[str] = set()
        self._streams: dict[str, Stream] = {}
        self._work = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tinychat-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: Request) -> Stream:
        """Hand a request in, from any thread. What cannot be taken in, or when it is closed, is told as Failed.

        Raises UsageError where a request with this id is being answered.
        """
        stream = Stream(request, self.cancel)
        with self._work:
            if request.id in self._streams:
                raise UsageError(f"request {request.id!r} is being answered", "give every request an id of its own")
            if self._closing:
                stream.put(_failed(request, STOPPED))
                return stream
            self._streams[request.id] = stream
            self._inbox.append(stream)
            self._work.notify()
        return stream

    def cancel(self, request_id: str) -> None:
        """End an answer after its current token, from any thread; one that has ended stays as it is."""
        with self._work:
            if request_id in self._streams:
                self._cancelled.add(request_id)
                self._work.notify()

    def close(self) -> None:
        """Cancel what is being answered, and stop. Raises what ended the thread, where that was an error."""
        with self._work:
            self._closing = True
            self._cancelled |= self._streams.keys()
            self._work.notify()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while self._waits_for_work():
                for event in self.scheduler.step():
                    self._deliver(event)
        except BaseException as error:  # noqa: BLE001  # told to every reader, and to who closes
            self.failure = error
        finally:
            self._end()

    def _waits_for_work(self) -> bool:
        """Take the inbox in; False once it is to stop and nothing is left."""
        with self._work:
            while not (self._inbox or self.scheduler.busy or self._closing):
                self._work.wait()
            arrived, cancelled = list(self._inbox), self._cancelled
            self._inbox.clear()
            self._cancelled = set()
        for stream in arrived:
            try:
                self.scheduler.submit(stream.request)
            except TinychatError as error:
                self._deliver(_failed(stream.request, error))
        for request_id in cancelled:
            self.scheduler.cancel(request_id)
        return self.scheduler.busy or not self._closing

    def _deliver(self, event: Event) -> None:
        stream = self._streams[event.request_id]
        if isinstance(event, Finished | Failed):
            with self._work:
                del self._streams[event.request_id]
        stream.put(event)

    def _end(self) -> None:
        """Nobody waits for ever."""
        with self._work:
            self._closing = True
            left = list(self._streams.values())
            self._streams.clear()
        for stream in left:
            stream.put(_failed(stream.request, STOPPED))


def _failed(request: Request, error: TinychatError) -> Failed:
    return Failed(request.id, error.message, error.remedy, error.exit_code)
