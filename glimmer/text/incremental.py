"""IncrementalText: the text of one answer, from token ids as they arrive, up to the first stop string.

The text is a function of the ids alone: it does not matter whether they arrive one at a time or many at once. The stop
string whose last character comes first ends the answer; of several that end on the same character, the longest counts.
Not here: stop tokens (the engine ends on those) and the meaning of the text (reasoning, tool calls).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

from glimmer.errors import RequestError, shown
from glimmer.text.tokenizer import Detokenizer, Tokenizer


class IncrementalText:
    """The text of one answer, released as soon as it can no longer be part of a stop string.

    stopped: the stop string that ended the answer, or None. The text is cut before it, or after it if
             `include_stop_str_in_output`.
    used:    how many ids were taken in, up to and including the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        prefix: str = "",
        min_tokens: int = 0,
    ):
        """`prefix` is shown in front of the answer (an echoed prompt) and is not searched for stop strings; those that
        end within the first `min_tokens` ids do not count.

        Raises RequestError if `stop` is not a list of texts of at least one character.
        """
        self.stopped: str | None = None
        self.used = 0
        self._include_stop, self._min_tokens = include_stop_str_in_output, min_tokens
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._search = StopSearch(stop)
        self._held = ""  # text that is still a beginning of a stop string
        self._unsaid = prefix
        self._released: list[str] = []
        self._finished = False

    @property
    def text(self) -> str:
        """All that push() and finish() have returned."""
        self._released[:] = ["".join(self._released)]
        return self._released[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """Take in the next ids; return the text that may be shown now. After a stop string, ids are ignored.

        Raises RequestError for an id that the vocabulary does not have.
        """
        assert self.stopped is not None or not self._finished, "push() after finish()"
        shown = []
        for id in token_ids:
            if self.stopped is not None:
                break
            self.used += 1
            shown.append(self._scan(self._detokenizer.push((id,))))
        return self._release("".join(shown))

    def finish(self) -> str:
        """No more ids will come: return the text that was held back. It may complete a stop string, too."""
        self._finished = True
        if self.stopped is not None:
            return self._release("")
        shown = self._scan(self._detokenizer.flush())
        if self.stopped is None:
            shown += self._held
            self._held = ""
        return self._release(shown)

    def _scan(self, text: str) -> str:
        """What of the held-back text and `text` may be shown. Sets `stopped` if a stop string is complete."""
        text, start = self._held + text, len(self._held)
        hit = self._search.advance(text, start, counts=self.used > self._min_tokens)
        if hit is not None:
            end, self.stopped = hit
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stopped)]
        # nothing is held back for a stop string that is itself part of the output
        shown = len(text) - (0 if self._include_stop else self._search.depth)
        self._held = text[shown:]
        return text[:shown]

    def _release(self, text: str) -> str:
        text, self._unsaid = self._unsaid + text, ""
        if text:
            self._released.append(text)
        return text


class StopSearch:
    """Searches for all stop strings at once, reading each character of the text once (the Aho-Corasick automaton).

    A state is a beginning of some stop string, or a whole one: the longest that the text now ends with. `depth` is the
    number of characters that could still become a stop string.
    """

    def __init__(self, stop: Sequence[str]):
        """Raises RequestError if `stop` is not a list of texts of at least one character."""
        if not isinstance(stop, list | tuple) or not all(isinstance(word, str) and word for word in stop):
            raise RequestError(
                "stop",
                f"stop is {shown(stop)}",
                "a list of texts of at least one character each",
                'write stop as a list, such as ["\\n\\n", "END"], without empty texts',
            )
        self._automaton = _automaton(tuple(stop))
        self._state = 0

    @property
    def depth(self) -> int:
        """How many characters at the end of the text are a beginning of a stop string."""
        return self._automaton.depth[self._state]

    def advance(self, text: str, start: int, counts: bool = True) -> tuple[int, str] | None:
        """Read text[start:]; return (end, stop string) of the first to be complete, `end` as an index in `text`.

        counts: False if what is complete within this text shall not end the answer.
        """
        longer, shorter, hit = self._automaton.longer, self._automaton.shorter, self._automaton.hit
        if len(longer) == 1:
            return None
        for i in range(start, len(text)):
            while self._state and text[i] not in longer[self._state]:
                self._state = shorter[self._state]
            self._state = longer[self._state].get(text[i], 0)
            found = hit[self._state]
            if found is not None and counts:
                return i + 1, found
        return None


class _Automaton:
    """The states of StopSearch. They do not change once they are made: all answers to a prompt share them."""

    def __init__(self, words: tuple[str, ...]):
        self.longer: list[dict[str, int]] = [{}]  # per state: character -> the state one character longer
        self.depth = [0]
        self.hit: list[str | None] = [None]  # the longest stop string that ends here
        self.shorter = [0]  # the next shorter beginning that the text also ends with
        for word in words:
            self._add(word)
        self._link()

    def _add(self, word: str) -> None:
        state = 0
        for character in word:
            if character not in self.longer[state]:
                self.longer[state][character] = len(self.longer)
                self.longer.append({})
                self.depth.append(self.depth[state] + 1)
                self.hit.append(None)
                self.shorter.append(0)
            state = self.longer[state][character]
        self.hit[state] = word

    def _link(self) -> None:
        """Fill `shorter` from the short states to the long, and record in each state a stop string that ends there."""
        queue = deque(self.longer[0].values())
        while queue:
            state = queue.popleft()
            if not self.longer[state]:  # a whole stop string, and no beginning of another
                self.depth[state] = self.depth[self.shorter[state]]
            for character, longer in self.longer[state].items():
                back = self.shorter[state]
                while back and character not in self.longer[back]:
                    back = self.shorter[back]
                self.shorter[longer] = self.longer[back].get(character, 0)
                self.hit[longer] = self.hit[longer] or self.hit[self.shorter[longer]]
                queue.append(longer)


_automaton = lru_cache(maxsize=8)(_Automaton)
