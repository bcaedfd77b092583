"""Threads that make things ready before they are asked for: in order, and never more than fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Condition, Lock, Thread
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Ahead(Generic[A, B]):
    """Calls a function with what an iterator yields, in `threads` threads that keep ahead of whoever takes the results.

    They begin nothing new while `most` results wait to be taken or are being made, or while those that wait weigh
    `most_weight`. What the iterator or the function raises is raised in its turn. A context, whose end lets go.
    """

    def __init__(
        self,
        call: Callable[[A], B],
        arguments: Iterator[A],
        *,
        threads: int,
        most: int,
        weigh: Callable[[B], int] = lambda _: 0,
        most_weight: int = 0,
    ) -> None:
        self._call, self._arguments, self._weigh = call, arguments, weigh
        self._most, self._most_weight = most, most_weight
        self._changed, self._reading = Condition(), Lock()
        self._results: dict[int, tuple[A, B] | BaseException] = {}
        self._begun = self._taken = self._weight = 0
        self._ended = False  # there is nothing more to begin
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Ahead[A, B]:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Begin nothing more, and wait for what has begun."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def ended(self) -> bool:
        """Whether all that there is was taken."""
        with self._changed:
            return self._ended and self._taken == self._begun

    def take(self, *, wait: bool) -> tuple[A, B] | None:
        """Return the next argument and its result; None where there is no more, or none yet and `wait` is False."""
        with self._changed:
            while self._taken not in self._results:
                if not wait or (self._ended and self._taken == self._begun):
                    return None
                self._changed.wait()
            result = self._results.pop(self._taken)
            self._taken += 1
            if not isinstance(result, BaseException):
                self._weight -= self._weigh(result[1])
            self._changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def _has_room(self) -> bool:
        waiting = self._begun - self._taken
        return self._ended or waiting == 0 or (waiting < self._most and self._weight <= self._most_weight)

    def _work(self) -> None:
        while (begun := self._begin()) is not None:
            place, argument = begun
            try:
                result: tuple[A, B] | BaseException = argument, self._call(argument)
            except Exception as error:  # noqa: BLE001 - raised where it is taken
                result = error
            self._keep(place, result)

    def _begin(self) -> tuple[int, A] | None:
        """Return the next argument and its place, once there is room for its result; None where there is no more."""
        with self._reading:  # a thread at a time; whoever takes a result does not wait for it
            with self._changed:
                self._changed.wait_for(self._has_room)
                if self._ended:
                    return None
            try:
                argument = next(self._arguments)
            except StopIteration:
                with self._changed:
                    self._ended = True
                    self._changed.notify_all()
                return None
            except Exception as error:  # noqa: BLE001 - raised where it is taken
                with self._changed:
                    self._ended = True
                    self._keep(self._begun, error)
                return None
            with self._changed:
                self._begun += 1
                return self._begun - 1, argument

    def _keep(self, place: int, result: tuple[A, B] | BaseException) -> None:
        with self._changed:
            self._results[place] = result
            if not isinstance(result, BaseException):
                self._weight += self._weigh(result[1])
            self._changed.notify_all()
