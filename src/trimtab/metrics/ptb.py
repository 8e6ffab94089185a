"""Words of a caption as the official evaluation takes them: Stanford's PTBTokenizer, lower case, punctuation dropped.

The official tokeniser is a Java program (in `pycocoevalcap`). This one gives the same words for what captions are made
of: plain and hyphenated words, contractions, possessives, abbreviations, numbers, quotes, brackets, and punctuation at
the ends of words. It differs, or may, in web addresses, smileys, tags, symbols within words, signs that are not ASCII
and rare contractions ("y'all"): `doubtful` finds such captions, and `captions.evaluate` does not score them unless
told to.
"""

from __future__ import annotations

# ruff: noqa: SIM905  (lists of words read better without quotes)
import re

# Abbreviations that keep their period, in either case.
_ALWAYS = frozenset("""
    mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt cpl pvt capt st
    ste ave pres lieut hon brig cmdr comdr pfc spc supt supts det mt ft adj adv asst assoc ens insp mlle mme msgr sfc jr
    sr bros esq ph inc cos co corp ltd plc bancorp bhd assn univ intl sys jan feb mar apr jun jul aug sep sept oct nov
    dec mon tue tues wed thu thurs fri ala ariz calif colo conn ct dak fla ga ind kans kan ky md mich minn mo mont neb
    nev okla penn tenn va vt wis wyo est al etc vs seq cf blvd rd sq bldg dept tel ext natl
""".split())  # fmt: skip
# Those that are words too, and keep it only with a capital; and those that keep it before a number.
_CAPITAL = frozenset("miss az ark del ill la mass ore pa tex wash".split())
_BEFORE_NUMBER = frozenset("no nos art fig figs prop pp op ca".split())

# With a capital, these begin a sentence.
_STARTS = frozenset("""
    a about according additionally after an as at but earlier he her here however if in it last many more mr. ms. now
    once one other our she since so some such that the their then there these they this we what when while yet you
""".split())  # fmt: skip

_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me", "wanna": "wan na",
    "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_LETTER = r"[^\W\d_]"
# Parts of a run of signs without a blank, tried in this order.
_PART = re.compile(
    rf"""
      (?P<special>(?i:'(?:tis|twas|em|cause|til)(?!\w)|'n'|(?<!\w)'\d\ds(?!\w)|-[lr][rcs]b-))
    | (?P<clitic>(?i:'(?:s|m|d|re|ve|ll)(?!\w)|(?<!\w)n't(?!\w)))
    | (?P<acronym>{_LETTER}(?:\.{_LETTER})+\.?(?![\w.]))      # u.s.
    | (?P<number>(?<!\w)[-+]?\.?\d+(?:[.,:/-]\d+)*(?![-/.,:]?\w))
    | (?P<name>(?<!\w)[A-Z]+&[A-Z]+(?!\w))                    # R&B
    | (?P<whole>(?i:o'[^\W\d_]{{2,}}|ma'am))                  # o'clock, O'Brien
    | (?P<word>\w+(?:[-/.]\w+)*)
    | (?P<tag>(?<!\w)[#@]{_LETTER}\w*)
    | (?P<dots>\.\.\.(?!\.))
    | (?P<shout>[!?]{{2,}})
    | (?P<bracket>[()\[\]{{}}])
    | (?P<sign>[&%$#/=+])
    | (?P<dropped>--?-?(?!-)|["',.:;!?`])
    | (?P<other>.)
    """,
    re.VERBOSE,
)
# Runs that the official tokeniser takes for something else: a telephone number, a web or mail address, an entity of
# HTML, and contractions, numbers and names of which only half is known.
_ELSE = re.compile(
    r"""[:;=]-?[()\[\]]|[:;=]-?[dp](?!\w)|\(\d{3}\)|www\.|://|&\w+;|\w[@#]|\.\.\.\.|[-/]['(\[{]|[)\]}'][-/]
    |(?-i:[A-Z]&[A-Z]*[a-z])|nn't|[\d/-]\w*n't|cannot'|(?<!\w)[dljy]'(?!\w)|(?<!\w)o'(?:re|ve|ll|\w+-)|'em\w|'till
    |'\d\d(?!s)|(?:ptys?|mfg)\.
    |\d[.,:/]\d+(?:[a-z]|-\w*[a-z]|/)|(?<!\w)-\d+[a-z/-]|\d[,:][a-z]|[a-z/-]\d+[.,:]\d|-\d+\.\d""",
    re.VERBOSE | re.IGNORECASE,
)
_LETTERS = re.compile(rf"\W*(?:{_LETTER}\.)+")
# A whole number and the fraction behind it are one word there.
_MIXED = re.compile(r"\d+ \d+/\d+")
_WORD = re.compile(r"\w+(?:-\w+)*|\w+/\w+")


def tokens(caption: str) -> list[str]:
    """The words of a caption: lower case, contractions split, punctuation dropped.

    >>> tokens("It's a well-lit street (in St. Louis).")
    ['it', "'s", 'a', 'well-lit', 'street', '-lrb-', 'in', 'st.', 'louis', '-rrb-']
    """
    return _read(caption)[0]


def doubtful(caption: str) -> str | None:
    """The first part of a caption that the official tokeniser may split otherwise, or None."""
    return _read(caption)[1]


def _read(caption: str) -> tuple[list[str], str | None]:
    found: list[str] = []
    doubt = None
    chunks = caption.replace("’", "'").split()
    for chunk, after in zip(chunks, [*chunks[1:], ""], strict=False):
        words, sure = _chunk(chunk, after)
        found += words
        # "no." at the end is one word if the next caption begins with a number.
        last = not after and chunk.lower().removesuffix(".") in _BEFORE_NUMBER and chunk.endswith(".")
        # A letter or acronym may lose its period before such a word, which the next caption may begin with.
        starts = not after or (after[0].isupper() and after.lower() in _STARTS)
        letters = starts and _LETTERS.fullmatch(chunk) is not None
        if doubt is None and (not sure or last or letters or _MIXED.match(f"{chunk} {after}")):
            doubt = chunk
    return found, doubt


def _chunk(chunk: str, after: str) -> tuple[list[str], bool]:
    """Words of a run of signs without a blank, and whether they are surely the official ones."""
    out: list[str] = []
    sure = all(c.isascii() or c.isalpha() for c in chunk) and _ELSE.search(chunk) is None
    place = 0
    while place < len(chunk):
        part = _PART.match(chunk, place)
        assert part is not None and part.lastgroup is not None
        kind, text, place = part.lastgroup, part.group(), part.end()
        if kind == "word":
            words, used = _words(text, chunk[place:], after)
            out += words
            place += used
            sure &= _WORD.fullmatch(text) is not None and not (words[0].endswith(".") and chunk[place:].startswith("."))
        elif kind in ("dropped", "dots", "shout"):
            sure &= not _within(chunk, part.start(), part.end())
            out += [text] if kind == "shout" else []
        elif kind == "bracket":
            out.append(_BRACKETS[text])
        else:
            out += _SPLIT.get(text.lower(), text.lower()).split()
            sure &= kind != "other"
    return out, sure


def _within(chunk: str, start: int, end: int) -> bool:
    """Whether punctuation stands within a word, or beside a period."""
    before, sign, after = chunk[start - 1 : start], chunk[start:end], chunk[end : end + 1]
    if sign in (",", ";", ":", '"', "-", "--"):
        return False
    return (before.isalnum() and after.isalnum()) or (sign == "." and after == ".")


def _words(text: str, rest: str, after: str) -> tuple[list[str], int]:
    """A word, split where it is a contraction, with its period where it is an abbreviation; and what it takes from the
    rest of its run."""
    short = text.lower()
    if rest[:2].lower() == "'t" and short.endswith("n") and len(short) > 1 and not rest[2:3].isalnum():
        return [short[:-1], "n't"], 2
    if short in _SPLIT:
        return _SPLIT[short].split(), 0
    if rest.startswith("."):
        number = (rest[1:] or after)[:1].isdigit()
        if (
            (len(short) == 1 and short.isalpha())
            or short in _ALWAYS
            or (short in _CAPITAL and text[0].isupper())
            or (short in _BEFORE_NUMBER and number)
            or rest.startswith(".,")
        ):
            return [short + "."], 1
    return [short], 0
