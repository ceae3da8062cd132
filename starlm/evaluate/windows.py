"""What the model sees of the requests of lm-evaluation-harness."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from starlm.errors import StarLMError

# Behind the decorator that it is registered by, a type checker does not know the class.
_HFLM: Any = HFLM


class Windows(_HFLM):
    """HFLM, but every window that the model sees is <|bos|> and then text, as in training.

    A window has at most `context` tokens, <|bos|> among them. A text's loglikelihood is that of its tokens
    after <|bos|>. HFLM counts the chance of <|bos|> as well, and loses it wherever it cuts.
    """

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task names no number: HFLM's, but at most half of the context."""
        return max(1, min(super().max_gen_toks, self.max_length // 2))

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokens of the text alone, also if it names <|bos|> at its beginning, as chat templates do."""
        tokens = super().tok_encode(string, add_special_tokens=False)
        return tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of prompts: <|bos|> and the end of each, for `left_truncate_len` tokens."""
        room = (left_truncate_len or self.max_length) - 1
        rows = [tokens[max(0, len(tokens) - room) :] for tokens in map(self.tok_encode, strings)]
        padded = self.tokenizer.pad(
            {"input_ids": [[self.prefix_token_id, *row] for row in rows]},
            padding_side=padding_side,
            return_tensors="pt",
        )
        return padded["input_ids"], padded["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both together, divided where the continuation begins; blanks before it belong to it.

        Where a token belongs to both, it is asked for. HFLM shows the context's own tokens and asks for as
        many fewer of all, so the model would see another text.
        """
        tokens = self.tok_encode(context + continuation)
        alone = self.tok_encode(context.rstrip())
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, alone, strict=False))
        known = len(list(alike))
        return tokens[:known], tokens[known:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text, that of a continuation of nothing."""
        texts = [(None, [], self.tok_encode(request.args[0])) for request in requests]
        return [total for total, _ in self._loglikelihood_tokens(texts, disable_tqdm)]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its loglikelihood, and whether each token is the likeliest."""
        split = []
        for texts, context, continuation in requests:
            if texts and not continuation:
                raise StarLMError(
                    f"The task asks how likely nothing is behind {texts[0][-80:]!r}. Leave empty choices and "
                    f"targets out of its data."
                )
            known = context[context[:1] == [self.prefix_token_id] :]
            split.append(list(self._split(known, continuation)))
        windows = [window for parts in split for window in parts]
        # Where two windows are equal but for their last token, HFLM computes one, and takes for the shorter
        # continuation the first of the longer one's logits, which are those of other tokens.
        shared = {(*known, *text[:-1]) for _, known, text in windows}
        self.logits_cache = len(shared) == len({((*a, *b[:-1]), len(b)) for _, a, b in windows})
        found = iter(super()._loglikelihood_tokens(windows, disable_tqdm, override_bs))
        answers = [[next(found) for _ in parts] for parts in split]
        return [(sum(total for total, _ in parts), all(best for _, best in parts)) for parts in answers]

    def _split(
        self, known: list[int], continuation: list[int]
    ) -> Iterator[tuple[None, list[int], list[int]]]:
        """The windows: what each shows before what it asks for. All together ask for the continuation."""
        text, begin, room = known + continuation, len(known), self.max_length
        while begin < len(text):
            # At least one token is shown besides <|bos|>, where there is one. The last one asked for is not.
            end = min(len(text), begin + max(1, room - (begin > 0)))
            yield None, [self.prefix_token_id, *text[max(0, end - room) : begin]], text[begin:end]
            begin = end
