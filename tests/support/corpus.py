"""Text made from word lists, templates and a seeded generator: one function per kind of line."""

import random
from collections.abc import Callable

ENGLISH = (
    "people time year way day thing man world life hand part child eye woman place work week case point government "
    "company number group problem fact soporific develop keep sleep step the of and to in is that for it with as was "
    "on are by this from have or an they which one you were all their there been many some would other into more "
    "these two may first then any like now over such our most even only also after made new could must being well"
).split()
CHINESE = (
    "天地人你我他好的一是在不了有和这中大为上个国说到时要就出会可也对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经"
    "么去法学如都同现当没动面起看定分还进小部其些主样理心前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点"
)
EMOJI = "😀 😂 👍 👍🏽 👩‍👩‍👧 🏳️‍🌈 ❤️ 🇨🇳 🇩🇪 1️⃣ ✈️ ©️ ☕ 🚀".split()
PUNCTUATION = ",.;:!?()[]{}<>/\\|@#$%^&*-_=+~`'\"，。；：！？（）【】《》、…—“”‘’·～￥"
WHITESPACE = ["\n", "\t", "\r\n", "\u3000", "\xa0", " "]
STATEMENTS = [
    "def {a}_{b}({a}, {b}=None):",
    '{a} = {b}[{n}] + "{a}"',
    "return {{'{a}': {n}.{n}}}",
    "if ({a} != {b} && !{a}) {{",
    '<{a} class="{b}">{a}</{a}><s>{b}</s>',
    "# {a}: {b} <n> <unk> <0x0A> eop sop dBLOCK",
]
# Code points of many scripts, with combining marks, jamo, right-to-left letters, controls, halves and emoji parts.
BLOCKS = [
    (0x00, 0x250), (0x300, 0x500), (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2070),
    (0x2100, 0x2200), (0x2460, 0x2500), (0x2F00, 0x2FD0), (0x3000, 0x3400), (0x4E00, 0x5000), (0xAC00, 0xAC80),
    (0xF900, 0xFDFE), (0xFE00, 0xFE20), (0xFE70, 0xFFF0), (0x1D400, 0x1D500), (0x1F1E6, 0x1F680),
]  # fmt: skip
CODE_POINTS = [code for first, last in BLOCKS for code in range(first, last) if code != 0x2581]


def english(rng: random.Random) -> str:
    words = []
    for word in rng.choices(ENGLISH, k=rng.randint(2, 14)):
        word = rng.choice([word] * 6 + [word.capitalize(), word.upper(), word + "s", word + "ing"])
        words.append(word + rng.choice([""] * 8 + [",", ".", "?", "!"]))
    return " ".join(words)


def chinese(rng: random.Random) -> str:
    return "".join(rng.choice(CHINESE) + rng.choice([""] * 9 + ["，", "。", "！"]) for _ in range(rng.randint(4, 30)))


def mixed(rng: random.Random) -> str:
    parts = [rng.choice([english, chinese, emoji])(rng) + rng.choice(["", " ", "\n", "  "]) for _ in range(3)]
    return "".join(parts)


def punctuation(rng: random.Random) -> str:
    return "".join(rng.choice([*PUNCTUATION, *ENGLISH]) for _ in range(rng.randint(3, 25)))


def emoji(rng: random.Random) -> str:
    return rng.choice(["", " "]).join(rng.choices([*EMOJI, *ENGLISH, *CHINESE], k=rng.randint(2, 12)))


def code(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(2, 6)):
        indent = rng.choice(["    ", "  ", "\t"]) * rng.randint(0, 5)
        a, b, n = rng.choice(ENGLISH), rng.choice(ENGLISH), rng.randint(0, 999)
        lines.append(indent + rng.choice(STATEMENTS).format(a=a, b=b, n=n))
    return "\n".join(lines)


def whitespace(rng: random.Random) -> str:
    pool = [*WHITESPACE, *rng.choices(ENGLISH, k=3), *rng.choices(CHINESE, k=3)]
    return "".join(rng.choice([rng.choice(pool), " " * rng.randint(1, 170)]) for _ in range(rng.randint(2, 12)))


def runs(rng: random.Random) -> str:
    return "".join(rng.choice(["a", "ha", "哈", "-", "=", "0", "。"]) * rng.randint(2, 60) for _ in range(3))


def any_unicode(rng: random.Random) -> str:
    return "".join(map(chr, rng.choices(CODE_POINTS, k=rng.randint(1, 20))))


KINDS = [english, chinese, mixed, punctuation, emoji, code, whitespace]


def generate(kinds: list[Callable[[random.Random], str]], num_lines: int, seed: int) -> list[str]:
    """Return `num_lines` lines of each kind, in turns."""
    rng = random.Random(seed)
    return [kind(rng) for _ in range(num_lines) for kind in kinds]
