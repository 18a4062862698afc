"""Many requests through an engine: taken as they are needed, answered as they finish."""

import queue
import threading
from collections.abc import Iterable, Iterator

from neo_jax.infer.engine import Engine
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.request import Request, Result

_WINDOW = 3  # requests under way for each lane: some run, some are prepared, some wait
_END = object()


def stream_results(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
    """Yields (number of the request, its result) as they finish, in any order.

    A thread takes requests from the iterable, so a slow source delays nobody else. One that is bad
    gives a result with an `error`; the others go on. An exception of the iterable is raised here.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()
    room, stopped = threading.Semaphore(_WINDOW * engine.slots), threading.Event()
    under_way: dict[RequestHandle, int] = {}

    def feed() -> None:
        count = 0
        try:
            for number, request in enumerate(requests):
                room.acquire()
                if stopped.is_set():
                    return
                handle = engine.submit(request)
                under_way[handle] = number
                count += 1
                handle.add_done_callback(done.put)
                if stopped.is_set():
                    handle.cancel()
            done.put((_END, count))
        except BaseException as error:
            done.put((error, count))

    threading.Thread(target=feed, name="neo-feed", daemon=True).start()
    total, finished = None, 0
    try:
        while total is None or finished < total:
            news = done.get()
            if isinstance(news, tuple):
                end, total = news
                if end is not _END:
                    raise end
                continue
            finished += 1
            room.release()
            yield under_way.pop(news), news.result()
    finally:
        stopped.set()
        room.release()
        for handle in list(under_way):
            handle.cancel()
