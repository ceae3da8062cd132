"""Reads are told one request at a time, and nobody else waits for them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from models import make_model
from servers import TOKENIZER

from starlm.generate.text import TextModel
from starlm.serve import reading
from starlm.serve.reading import Reader
from starlm.serve.schemas import ReadsRequest


def test_who_waits_holds_no_thread():
    """Prompts are tokenized on the same threads."""
    text = TextModel(make_model("star", vocab_size=TOKENIZER.vocab_size), TOKENIZER)
    served = SimpleNamespace(name="tiny", tokenizer=TOKENIZER, text=text)
    body = ReadsRequest(model="tiny", tokens=[TOKENIZER.bos] * 2000)

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        reader = Reader()
        asked = [asyncio.create_task(reader.read(served, body)) for _ in range(4)]
        await asyncio.sleep(0)
        await asyncio.to_thread(int)
        assert sum(task.done() for task in asked) <= 1
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 4

    asyncio.run(main())


def test_more_than_can_wait_are_refused(monkeypatch):
    monkeypatch.setattr(reading, "WAITING", 2)
    text = TextModel(make_model("star", vocab_size=TOKENIZER.vocab_size), TOKENIZER)
    served = SimpleNamespace(name="tiny", tokenizer=TOKENIZER, text=text)
    body = ReadsRequest(model="tiny", tokens=[TOKENIZER.bos] * 9)

    async def main():
        reader = Reader()
        answers = await asyncio.gather(*(reader.read(served, body) for _ in range(5)), return_exceptions=True)
        assert [getattr(answer, "status", 200) for answer in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].headers["Retry-After"] == "1"
        assert (await reader.read(served, body)).status_code == 200

    asyncio.run(main())
