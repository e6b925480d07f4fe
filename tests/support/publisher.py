"""A process that publishes, withdraws and collects until it is killed.

Usage: publisher.py ROOT FIRST_NUMBER [row-first]

It says what it is about to do and what was answered, a line each: ``try N``, ``put N``,
``deleting N``, ``deleted N``. With ``row-first`` it stores in a wrong order, as a control.
"""

import os
import sys

from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.registry.directory import DirectoryRegistry
from esper.registry.screening import Screening

SIZE = 4_000


def row_first(registry, data):
    """Publish the row, then write under the final name, as a careless program would."""
    screening = Screening(digest=None, record=None, max_bytes=len(data))
    screening.update(data)
    screened = screening.finish()
    registry.book.artifacts.publish(screened, 0.0)
    with (registry.root / "blobs" / screened.digest).open("wb", buffering=0) as file:
        for start in range(0, len(data), 64):
            file.write(data[start : start + 64])


def say(word, number):
    os.write(1, f"{word} {number}\n".encode())


def main():
    root, first = sys.argv[1], int(sys.argv[2])
    if sys.argv[3:] == ["row-first"]:
        DirectoryRegistry.put = row_first
    registry = DirectoryRegistry(root)
    number = first
    while True:
        data = artifact(number, size=SIZE)
        say("try", number)
        registry.put(data)
        say("put", number)
        if number % 3 == 2 and number > first:
            say("deleting", number - 1)
            registry.delete(artifact_format.digest_of(artifact(number - 1, size=SIZE)))
            say("deleted", number - 1)
            registry.collect(grace_s=0.0)
        number += 1


if __name__ == "__main__":
    main()
