"""A plotter's letters: a second typeface for training, so that reading is not learned from one font alone.

A character is some lines, a line some points, a point two digits: x from the left and y from the top. Capitals and
digits stand between y = 0 and the base line y = 6, small letters begin at y = 2, descenders end at y = 8.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageDraw

BASE, UNITS = 6, 8.5
STROKES = {
    "0": "102031352616050110", "1": "011016", "2": "01102031320636", "3": "01102031322313 233435261605",
    "4": "2026 200434", "5": "30000312223335261605", "6": "312010010516263534231304", "7": "003016",
    "8": "102031322313020110 1304051626353423", "9": "051626353120100102132332",
    "A": "062046 1434", "B": "00063645443303 3342413000", "C": "4130100105163645", "D": "00063645413000",
    "E": "40000646 0333", "F": "400006 0333", "G": "41301001051636454323", "H": "0006 4046 0343",
    "I": "1016 0020 0626", "J": "3035261605", "K": "0006 400346", "L": "000646", "M": "0600234046", "N": "06004640",
    "O": "103041453616050110", "P": "06003041423303", "Q": "103041453616050110 2446", "R": "06003041423303 2346",
    "S": "413010010213334445361605", "T": "0040 2026", "U": "000516364540", "V": "002640", "W": "0016223640",
    "X": "0046 4006", "Y": "002340 2326", "Z": "00400646",
    "a": "3236 3322120305162635", "b": "0006 0312223335261605", "c": "3322120305162635",
    "d": "3036 3322120305162635", "e": "04343322120305162635", "f": "201116 0222", "g": "3237281807 3322120305162635",
    "h": "0006 0312223336", "i": "0206 0000", "j": "121708 1010", "k": "0006 320436", "l": "000516",
    "m": "0206 03122326 23324346", "n": "0206 0312223336", "o": "122233352616050312", "p": "0208 0312223335261605",
    "q": "3238 3322120305162635", "r": "0206 031222", "s": "33221203142435261605", "t": "101526 0222",
    "u": "0205162635 3236", "v": "022642", "w": "0216233642", "x": "0236 3206", "y": "0226 4218", "z": "02320636",
}  # fmt: skip

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@lru_cache(maxsize=256)
def lines(character: str, serif: bool) -> tuple[tuple[Point, ...], ...]:
    """The lines of a character; `serif` adds a bar to each upright end."""
    plain = [[(int(a), int(b)) for a, b in zip(s[::2], s[1::2], strict=True)] for s in STROKES[character].split()]
    ends = [pair for line in plain if len(line) > 1 for pair in ((line[0], line[1]), (line[-1], line[-2]))]
    upright = [end for end, inner in ends if end[0] == inner[0] and abs(end[1] - inner[1]) > 2] if serif else []
    bars = [((x - 0.8, float(y)), (x + 0.8, float(y))) for x, y in upright]
    return (*(tuple((float(x), float(y)) for x, y in line) for line in plain), *bars)


def pen(size: int, weight: int) -> float:
    """The width of a line."""
    return size * (0.075 + 0.025 * weight)


def extent(character: str, size: int, weight: int, serif: bool) -> tuple[float, Box]:
    """How far a character of a line height advances, and the box of its ink from its origin."""
    unit, edge = size / UNITS, pen(size, weight) / 2
    xs, ys = zip(*(point for line in lines(character, serif) for point in line), strict=True)
    left, right = min(xs) * unit - edge, max(xs) * unit + edge
    return right - left + 0.6 * unit, (left, min(ys) * unit - edge, right, max(ys) * unit + edge)


def write(draw: ImageDraw.ImageDraw, origin: Point, character: str, size: int, weight: int, serif: bool) -> None:
    """Draw a character in white with round line ends."""
    unit, width = size / UNITS, pen(size, weight)
    edge = width / 2
    for line in lines(character, serif):
        points = [(origin[0] + x * unit, origin[1] + y * unit) for x, y in line]
        draw.line(points, fill=255, width=max(1, round(width)), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - edge, y - edge, x + edge, y + edge), fill=255)
