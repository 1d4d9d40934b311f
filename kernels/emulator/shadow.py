#!/usr/bin/env python3
"""shadow.py SOURCES OUT: writes those headers of SOURCES that have inline PTX to OUT, without it.

Functions with `asm`, their own or a macro's, are left out. In place of the first stands an #include of wrappers/<path of the
header>, which defines them in C++. If some are not defined there, an #error says which; so only tests that include that
header fail. Everything else stays on its line.
"""
import re
import shutil
import sys
from pathlib import Path

WRAPPERS = Path(__file__).resolve().parent / 'wrappers'


def code(text):
    """Text without comments and what is in strings."""
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"', '', text)


def macros_with_asm(text):
    """Names of the macros with `asm`, themselves or by another macro."""
    definitions = re.findall(r'^#define (\w+)((?:.*\\\n)*.*)', code(text), re.M)
    names = {'asm'}
    while more := {name for name, body in definitions if names & set(re.findall(r'\w+', body))} - names:
        names |= more
    return names


def pieces(text):
    """The text in pieces: definitions that begin in column 0 with `template` or `__device__`, and the lines between them."""
    lines = text.splitlines(keepends=True)
    while lines:
        size = 1
        if re.match(r'(template|__device__)\b', lines[0]):
            # It ends where all braces are closed, on a line that ends with one or with a semicolon.
            while size < len(lines):
                so_far = code(''.join(lines[:size])).rstrip()
                if so_far.endswith(('}', ';')) and so_far.count('{') == so_far.count('}'):
                    break
                size += 1
        yield ''.join(lines[:size])
        lines = lines[size:]


def shadow(path, text):
    """The header at `path` without functions that have asm."""
    names = macros_with_asm(text)
    kept, left_out, place = [], [], 0
    for piece in pieces(text):
        is_definition = re.match(r'(template|__device__)\b', piece)
        if not is_definition or not names & set(re.findall(r'\w+', code(piece))):
            kept.append(piece)
            continue
        if not left_out:
            place = len(kept)
        left_out.append(re.search(r'(\w+)(<[^<>()]*>)?\(', code(piece)).group(1))
        kept.append('\n' * piece.count('\n'))
    wrapper = WRAPPERS / path
    defined = wrapper.read_text() if wrapper.exists() else ''
    missing = [name for name in dict.fromkeys(left_out) if not re.search(rf'\b{name}\(', defined)]
    if left_out:
        line = f'#error "{wrapper} does not define: {", ".join(missing)}"' if missing else f'#include "{wrapper}"'
        kept[place] = line + kept[place]
    return ''.join(kept)


def main():
    sources, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    shutil.rmtree(out, ignore_errors=True)
    for source in sorted(sources.rglob('*.cu*')):
        text = source.read_text()
        if re.search(r'\basm\b', code(text)):
            path = source.relative_to(sources)
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_text(f'#line 1 "{source}"\n' + shadow(path, text))


main()
