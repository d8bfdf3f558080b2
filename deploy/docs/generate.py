#!/usr/bin/env python3
"""Write manual pages and shell completions from what programs print with --help.

usage: generate.py --out DIR [--date YYYY-MM-DD] PROGRAM...

The help text is the one source: of latte-server it is printed from the option table, so an option
that is added there is in all of these at the next build. A line of help that looks like an option
and cannot be read ends this with an error. Only Python's standard library is used.
"""
import argparse
import dataclasses
import pathlib
import re
import subprocess
import sys

SUMMARIES = {
    "latte-server": "serve a Latte language model over HTTP",
    "latte-run": "complete a prompt, talk, or score a text with a Latte model",
    "latte-bench": "measure the engine, latte-server, or any OpenAI-compatible server",
}
OPTION = re.compile(
    r"^ {2,6}(?:-(?P<short>\w), )?--(?P<no>\[no-\])?(?P<long>[a-z][a-z0-9-]*)"
    r"(?: (?P<value>\S+(?: \S+)*?))?(?:, --(?P<twin>[a-z-]+))? {2,}(?P<help>\S.*)$"
)


@dataclasses.dataclass
class Option:
    """One option: its names, the word for its value (or None), its lines of help."""

    short: str | None
    long: str
    negatable: bool
    value: str | None
    help: list[str]

    @property
    def names(self):
        return ["--" + self.long] + (["--no-" + self.long] if self.negatable else [])

    @property
    def choices(self):
        return self.value.split("|") if self.value and "|" in self.value else []

    @property
    def takes_directory(self):
        return bool(self.value) and self.value.startswith("DIR")

    @property
    def takes_file(self):
        return self.value in ("FILE", "PATH")

    @property
    def summary(self):
        return self.help[0].rstrip(".")


@dataclasses.dataclass
class Page:
    """What one --help says: usage lines, paragraphs before and after the options."""

    usage: list[str]
    before: list[str]
    options: list[Option]
    after: list[str]


def read_options(line, options):
    """Append the options of a line of help; False when it has none."""
    found = OPTION.match(line)
    if not found:
        if re.match(r"^ {2,6}-", line):
            sys.exit(f"generate.py: this line of help is not understood: {line!r}")
        return False
    parts = found.groupdict()
    if parts["twin"]:
        options.append(Option(None, parts["twin"], False, None, [parts["help"]]))
    options.append(
        Option(parts["short"], parts["long"], bool(parts["no"]), parts["value"], [parts["help"]])
    )
    return True


def parse(text):
    page = Page([], [], [], [])
    for line in text.splitlines():
        in_usage = page.usage and not page.options and not page.before
        if re.match(r"(?i)usage: ", line) or (in_usage and line.startswith(" " * 7)
                                              and not OPTION.match(line)):
            page.usage.append(re.sub(r"(?i)^usage: +", "", line).strip())
        elif read_options(line, page.options):
            page.after.clear()
        elif page.options and re.match(r"^ {10,}\S", line):
            page.options[-1].help.append(line.strip())
        else:
            (page.after if page.options else page.before).append(line)
    return page


def run(program, *words):
    done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    return done.stdout


# Manual pages.


def roff(text):
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in (".", "'") else text


def roff_paragraphs(lines):
    out, paragraph = [], []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            out += [".PP", *map(roff, paragraph)]
            paragraph = []
    return out[1:]


def roff_options(options):
    out = []
    for option in options:
        names = [f"\\fB\\-{option.short}\\fR"] if option.short else []
        negatable = "[no\\-]" if option.negatable else ""
        names.append(f"\\fB\\-\\-{negatable}{roff(option.long)}\\fR")
        value = f" \\fI{roff(option.value)}\\fR" if option.value else ""
        out += [".TP", ", ".join(names) + value, roff(option.help[0])]
        for line in option.help[1:]:
            out += [".br", roff(line)] if "LATTE_" in line else [roff(line)]
    return out


def manual(name, version, date, pages):
    main = pages[""]
    out = [f'.TH {name.upper()} 1 {date} "{name} {version}"', ".SH NAME",
           f"{roff(name)} \\- {roff(SUMMARIES[name])}", ".SH SYNOPSIS", ".nf"]
    out += [roff(line) for line in main.usage] + [".fi"]
    description = [line for line in main.before if not line.startswith(name + " ")]
    description = description if any(map(str.strip, description)) else [SUMMARIES[name] + "."]
    out += [".SH DESCRIPTION", *roff_paragraphs(description)]
    if main.options:
        out += [".SH OPTIONS", *roff_options(main.options)]
    for command in filter(None, pages):
        page = pages[command]
        out += [f".SH {command.upper()}", ".nf", *map(roff, page.usage), ".fi"]
        notes = roff_paragraphs(page.before) + roff_options(page.options)
        out += notes + ([".PP"] if any(page.after) else []) + roff_paragraphs(page.after)
    if any(main.after):
        out += [".SH NOTES", *roff_paragraphs(main.after)]
    others = [f"\\fB{roff(other)}\\fR(1)" for other in SUMMARIES if other != name]
    out += [".SH SEE ALSO", ",\n".join(others)]
    return "\n".join(out) + "\n"


# Completions.


def bash_case(options):
    lines = []
    for option in options:
        if not option.value:
            continue
        names = "|".join(option.names + (["-" + option.short] if option.short else []))
        if option.choices:
            action = f'_latte_words "{" ".join(option.choices)}"'
        elif option.takes_directory:
            action = "_latte_files -d"
        elif option.takes_file:
            action = "_latte_files -f"
        else:
            action = ":"
        lines.append(f"        {names}) {action}; return ;;")
    return lines


def bash_body(options, extra=()):
    words = " ".join([*extra, *(name for option in options for name in option.names)])
    return ['    case "$previous" in', *bash_case(options), "    esac", f'    _latte_words "{words}"']


BASH_HELPERS = """\
_latte_words() { mapfile -t COMPREPLY < <(compgen -W "$1" -- "$current"); }
_latte_files() {
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$current")
}
"""
BASH_HEAD = """\
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi"""


def bash(name, pages):
    commands = [command for command in pages if command]
    function = "_" + name.replace("-", "_")
    out = [f"# bash completion of {name}, made from its --help", BASH_HELPERS + function + "() {",
           BASH_HEAD]
    if commands:
        out += ['    case "${COMP_WORDS[1]}" in']
        for command in commands:
            out += [f"    {command})"] + ["    " + line for line in bash_body(pages[command].options)]
            out += ["        return ;;"]
        out += ["    esac", f'    (( COMP_CWORD == 1 )) && _latte_words "{" ".join(commands)} '
                '--help --version"']
    else:
        out += bash_body(pages[""].options)
    return "\n".join([*out, "}", f"complete -F {function} {name}", ""])


def zsh_options(options, indent):
    lines = []
    for option in options:
        text = re.sub(r"([\[\]:\\])", r"\\\1", option.summary).replace("'", "'\\''")
        value = ""
        if option.value:
            action = "(" + " ".join(option.choices) + ")" if option.choices else " "
            action = "_files -/" if option.takes_directory else action
            action = "_files" if option.takes_file else action
            word = "value" if option.choices else re.sub(r"[^A-Za-z ]", "", option.value)
            value = f":{word}:{action}"
        names = option.names + (["-" + option.short] if option.short else [])
        for spelling in names:
            equals = "=" if value and spelling.startswith("--") else ""
            lines.append(f"{indent}'{spelling}{equals}[{text}]{value}'")
    return lines


def zsh(name, pages):
    commands = [command for command in pages if command]
    out = [f"#compdef {name}", f"# zsh completion of {name}, made from its --help"]
    if not commands:
        return "\n".join([*out, "_arguments \\", " \\\n".join(zsh_options(pages[""].options, "  ")),
                          ""])
    out += ["if (( CURRENT == 2 )); then", f"  compadd {' '.join(commands)} -- --help --version",
            "  return", "fi", "local command=$words[2]", "shift words", "(( CURRENT-- ))",
            "case $command in"]
    for command in commands:
        out += [f"  {command}) _arguments \\",
                " \\\n".join(zsh_options(pages[command].options, "    ")), "  ;;"]
    return "\n".join([*out, "esac", ""])


def fish(name, pages):
    out = [f"# fish completion of {name}, made from its --help", f"complete -c {name} -f"]
    commands = [command for command in pages if command]
    if commands:
        out.append(f"complete -c {name} -n __fish_use_subcommand -a '{' '.join(commands)}'")
        out += [f"complete -c {name} -n __fish_use_subcommand -l {word}"
                for word in ("help", "version")]
    for command, page in pages.items():
        when = f" -n '__fish_seen_subcommand_from {command}'" if command else ""
        for option in page.options:
            text = option.summary.replace("\\", "\\\\").replace("'", "\\'")
            for spelling in option.names:
                line = f"complete -c {name}{when} -l {spelling[2:]}"
                line += f" -s {option.short}" if option.short else ""
                if option.value:
                    line += " -x" if not (option.takes_file or option.takes_directory) else " -r -F"
                if option.choices:
                    line += f" -a '{' '.join(option.choices)}'"
                out.append(f"{line} -d '{text}'")
    return "\n".join([*out, ""])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--date", required=True)
    parser.add_argument("programs", nargs="+", type=pathlib.Path)
    given = parser.parse_args()
    for program in given.programs:
        name = program.name
        version = run(program, "--version").split()[1]
        pages = {"": parse(run(program, "--help"))}
        commands = re.findall(rf"^{name} ([a-z]+) ", "\n".join(pages[""].usage), re.M)
        for command in dict.fromkeys(commands):
            pages[command] = parse(run(program, command, "--help"))
        write(given.out / "man" / f"{name}.1", manual(name, version, given.date, pages))
        write(given.out / "bash" / name, bash(name, pages))
        write(given.out / "zsh" / f"_{name}", zsh(name, pages))
        write(given.out / "fish" / f"{name}.fish", fish(name, pages))


main()
