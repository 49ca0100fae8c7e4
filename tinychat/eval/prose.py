"""A small English text, written for this project: what models that know the world are compared and scored on."""

from __future__ import annotations

PROSE = """\
The ferry leaves the island at half past six, and on most mornings nobody is on the pier but the postman and two dogs.
He hands the sacks over the railing, waits until the engine changes its tone, and walks back up the hill with his hands
in his pockets. In winter he carries a lamp. The dogs do not belong to him, yet they follow him to the last house and
lie down there until the evening boat comes in.

Bread needs four things: flour, water, salt and time. Mix the first three until no dry flour is left, cover the bowl and
leave it for an hour. Fold the dough over itself from each of its four sides, turn it, and wait again. After the third
round it should hold its shape and tremble a little when the bowl is moved. Bake it in a very hot oven, at first under a
lid, so that the steam stays near the crust.

A bridge moves all day. The sun warms the deck before it warms the beams, so the road grows longer by the width of a
hand; at night it shrinks again. Engineers leave gaps at both ends and cover them with steel combs whose teeth slide
past each other. Whoever drives across hears only a short rattle and seldom asks what it is for.

"You said that it would take ten minutes," said Clara. "I said about ten minutes," her brother answered without looking
up from the bicycle. "The chain is off, the brake is stuck, and somebody has used the good pump as a hammer." She sat
down on the step. "It was a small nail," she said after a while. He tried not to laugh and failed.

To sort a list, one can pick any element and split the rest into those that are smaller and those that are not. Both
parts are sorted in the same way, and the results are joined with the chosen element between them. If the parts are
about equally long, the work grows only a little faster than the list; if the list was sorted already and the first
element is always picked, it grows with the square of the length.

In the year of the great drought the lake fell by eleven metres. Fence posts appeared, then a stone wall, and at last
the floor of a church that had been flooded when the dam was built. Old people came on Sundays and pointed out where the
bakery had stood. When the rain returned in October, it took nine weeks until the water closed over the highest step.

The heart of a mouse beats about six hundred times a minute, that of an elephant about thirty. Over a lifetime the two
numbers come out surprisingly close: small animals live fast and briefly, large ones slowly and long. Humans do not fit
the rule. Clean water, enough to eat and a roof have given us far more beats than our size would suggest.

Notice to all tenants. On Thursday the 14th the water will be turned off between 9 a.m. and 1 p.m. while a valve in the
cellar is replaced. Please fill a kettle beforehand and keep all taps closed. Should the work take longer, we will put a
new notice next to the lift. Questions are answered in office 3, on the ground floor, from Monday to Friday.

Light takes a little more than eight minutes from the sun to the earth. What we see of the nearest star beyond it left
more than four years ago. With a good telescope one can look at galaxies whose light set out before there were any
people to receive it. A picture of the night sky is therefore not a picture of one moment, but an album in which every
page is from another time.

The old clock in the station had two faces, and they never agreed. Travellers coming from the town believed the western
one and were early; those who changed trains believed the eastern one and ran. When the railway offered to repair it,
the town council voted against the plan by a single vote. The difference, its members wrote, had become a custom.

A good map leaves things out. It shows the roads that a driver may take and not the fields between them, the depth of a
channel and not the colour of its water. Whoever wants to draw everything ends with a map as large as the country, which
is of no use to anybody and covers the crops. The art lies in knowing what the reader will not ask.

She had learned to play the violin at the age of fifty-two, against the advice of everyone who lived in the same
building. In the first year she practised scales with a rubber mute; in the second, slow dances; in the third the
neighbour from the floor below rang the bell, and she was ready to apologize. He had brought his cello.

Steel rusts because iron binds oxygen more readily than it lets it go. A coat of zinc protects it even where it is
scratched: the zinc is attacked first, and as long as some of it is left nearby, the iron stays whole. Ships carry
blocks of zinc on their hulls for the same reason. Every few years they are found eaten away, unscrewed and replaced.

The committee met on the second of March with seven of its nine members present. The minutes of the last meeting were
approved with one correction. Mr. Okafor reported that 1,240 copies had been printed, of which 1,015 were sold and 38
were damaged. It was agreed to lower the price from 12.50 to 9.00 and to look at the matter again in June.

If you walk into the forest in late autumn, stop for a moment and listen. At first there is nothing; then a single leaf
comes down through the branches and can be heard to touch every one of them. A jay warns the others. Far away someone is
splitting wood, and between the stroke that you see and the stroke that you hear there is room for a breath.

Every translation is a bargain. The rhyme can be kept if the meaning bends a little; the meaning can be kept if the
rhyme is given up; and there is a third way, in which both are lost but something else is found that neither language
had before. Readers seldom notice the bargain. They only say that the book sounds as if it had been written for them.
"""


def paragraphs() -> tuple[str, ...]:
    """The text's paragraphs, each on one line."""
    return tuple(" ".join(part.split()) for part in PROSE.strip().split("\n\n"))


def joined() -> str:
    """The whole text, one paragraph a line."""
    return "\n".join(paragraphs())
