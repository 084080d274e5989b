"""Several servers of one model as one: each request goes to the one with the fewest in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.prompts import Prompt
from lenvm.sampling.servers import Completion, Server
from lenvm.sampling.transport import RequestFailedError


class ServerPool:
    """What a run asks of a server, answered by many. A server that goes away is left out, the others go on.

    Args:
        servers: at least one; after `open` they must agree about model, token ids and seeds.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(servers)
        self._load = dict.fromkeys(range(len(servers)), 0)
        self.notes: list[str] = []

    @property
    def group(self) -> int:
        """Completions that a request carries; known once they are open."""
        return min(s.group for s in self._servers)

    @property
    def url(self) -> str:
        """All addresses, for messages."""
        return ", ".join(s.url for s in self._servers)

    @property
    def model(self) -> str:
        """Name of the model they all serve."""
        return self._servers[0].model

    @property
    def token_ids(self) -> str:
        """Where token ids come from."""
        return self._servers[0].token_ids

    @property
    def seeds_honoured(self) -> bool | None:
        """Whether seeds of requests decide what is drawn; None where that is not known."""
        return self._servers[0].seeds_honoured

    async def open(self, client: httpx.AsyncClient, first: Prompt) -> None:
        """Open all.

        Raises:
            SamplingError: if one cannot be used, or they are not alike: completions of one file come from one model.
        """
        await asyncio.gather(*(s.open(client, first) for s in self._servers))
        one = self._servers[0]
        for other in self._servers[1:]:
            for name in ("model", "token_ids", "seeds_honoured"):
                if getattr(one, name) != getattr(other, name):
                    raise SamplingError(
                        f"{one.url} and {other.url} are not alike: {name} is {getattr(one, name)!r} and "
                        f"{getattr(other, name)!r}; sample from servers of one model (--model names it)."
                    )
        self.notes = list(dict.fromkeys(note for s in self._servers for note in s.notes))

    async def draw(self, client: httpx.AsyncClient, prompt: Prompt, samples: Sequence[int]) -> list[Completion]:
        """The completions with these numbers, from whoever has the least to do.

        Raises:
            RequestFailedError: if a server refuses, or none can be reached.
        """
        last: RequestFailedError | None = None
        tried: set[int] = set()
        while untried := self._load.keys() - tried:  # one that dies may still look alive: not the same again
            k = min(sorted(untried), key=self._load.__getitem__)
            tried.add(k)
            self._load[k] += 1
            try:
                return await self._servers[k].draw(client, prompt, samples)
            except RequestFailedError as error:
                if not error.unreachable:
                    raise
                last = error
                if not await self._servers[k].alive(client) and self._load.pop(k, None) is not None:
                    self.notes.append(f"{self._servers[k].url} went away; the other servers went on.")
            finally:
                if k in self._load:
                    self._load[k] -= 1
        raise last or RequestFailedError("none of the servers can be reached any more", unreachable=True)

    async def alive(self, client: httpx.AsyncClient) -> bool:
        """Whether any of them answers."""
        return any(await asyncio.gather(*(s.alive(client) for s in self._servers)))


Source = Server | ServerPool
"""Who draws."""
