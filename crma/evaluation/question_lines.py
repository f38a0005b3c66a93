"""Reads a question set that arrives in pieces: each line is checked as soon as it is complete."""

from crma.core.errors import ConfigError
from crma.core.json_lines import checked
from crma.evaluation.question_set import (
    MAX_ITEMS,
    Question,
    QuestionIds,
    QuestionsDigest,
    check_size,
)

MAX_LINE_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class QuestionLines:
    """JSON Lines of questions, piece by piece; no more than a piece and a line is held.

    Args:
        name: of the set, for the places in errors.

    Attributes:
        num_items: questions so far.
    """

    def __init__(self, name: str) -> None:
        self.num_items = 0
        self._name = name
        self._num_lines = 0
        self._rest = bytearray()
        self._ids = QuestionIds()
        self._digest = QuestionsDigest()

    def read(self, piece: bytes) -> list[Question]:
        """Take the next piece, and return the questions that are complete by now.

        Raises:
            ConfigError: as `parse_question_set`; or there are too many questions, or a line is
                longer than MAX_LINE_BYTES.
        """
        first, *others = piece.split(b"\n")
        self._rest += first  # in place: a line may come byte by byte
        questions: list[Question] = []
        for begun in others:
            questions += self._read_line(bytes(self._rest))
            self._rest = bytearray(begun)
        self._check_length(self._rest)
        return questions

    def end(self) -> tuple[list[Question], str]:
        """No more comes. Returns the last questions, and the digest of all.

        Raises ConfigError as `read`, or if there was no question at all.
        """
        questions = self._read_line(bytes(self._rest))
        check_size(self._name, self.num_items)
        return questions, self._digest.value

    def _read_line(self, line: bytes) -> list[Question]:
        """The question of a line; none of a blank one."""
        self._check_length(line)
        self._num_lines += 1
        if self._num_lines == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            return []
        place = self._place
        question = checked(place, line, Question.model_validate_json, ConfigError)
        self._ids.add(place, question)
        self._digest.add(question)
        self.num_items += 1
        if self.num_items > MAX_ITEMS:
            check_size(self._name, self.num_items)
        return [question]

    @property
    def _place(self) -> str:
        return f"{self._name} line {self._num_lines}"

    def _check_length(self, line: bytes | bytearray) -> None:
        if len(line) > MAX_LINE_BYTES:
            place = f"{self._name} line {self._num_lines + 1}"
            allowed = f"<= {MAX_LINE_BYTES} bytes"
            raise ConfigError(
                f"{place} is too long.", field=place, value=len(line), allowed=allowed
            )
