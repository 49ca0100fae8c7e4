"""A small English text, written for calibration: everyday prose, instructions, figures, code, lists, and dialogue."""

from __future__ import annotations

import random

PARAGRAPHS = (
    "The ferry left the island at a quarter past six, when the fog had thinned enough to show the two red lamps at the "
    "mouth of the harbour. Three cyclists, a woman with a cello and a van full of cheese were on board. Nobody spoke "
    "until the engine found its rhythm; then everybody did.",
    "To replace the battery, hold the two clips at the back and slide the cover towards you. Take the old cell out, "
    "wait ten seconds, and put the new one in with the plus sign up. If the light does not turn green within a minute, "
    "check that the contacts are clean and dry.",
    "Revenue rose from 4.2 million in 2019 to 5.7 million in 2023, an average growth of about 8 % a year. Costs grew "
    "more slowly, by 3.1 %, so that the margin went from 11 to 19 per cent. Two thirds of the gain came from repairs "
    "and not from new sales.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    yield total / width\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n        yield total / width\n",
    "Water expands when it freezes because its molecules settle into an open lattice that takes more room than the "
    "crowd of the liquid. That is why ice floats, why pipes burst in January, and why a lake freezes from the top and "
    "leaves the fish a room below.",
    '"Did you lock the shed?" she asked. He had not. "I think so," he said, and put on his boots again. Outside it '
    "smelled of rain and cut grass; the dog next door barked once, thought better of it, and went back to sleep.",
    "Ingredients for four: 400 g of lentils, 2 onions, 3 carrots, 1 litre of stock, a spoon of cumin, salt, and the "
    "juice of half a lemon. Fry the onions until they are golden. Add the rest but the lemon, and simmer for 35 "
    "minutes. Taste before you add salt.",
    "The treaty of the two valleys was signed in a barn, since neither side would enter the other's town. It had five "
    "articles: on grazing, on the bridge, on the bell, on marriages, and on what should happen if anybody broke the "
    "first four. Only the fifth was ever used.",
    "A triangle with sides 5, 12 and 13 has a right angle, because 25 + 144 = 169. Its area is half of 5 times 12, "
    "which is 30, and the radius of the circle inside it is the area divided by half of the perimeter: 30 / 15 = 2.",
    "Dear Ms Okafor, thank you for your letter of 3 March. We are sorry that the lamp arrived broken. A new one was "
    "sent to you today and should be with you by Thursday; please keep the old one for the driver. Yours sincerely, "
    "Tomas Lindqvist, Customer Service.",
    '{"order": 10482, "items": [{"name": "rope", "metres": 25, "price": 31.5}, {"name": "hook", "count": 6, '
    '"price": 2.2}], "paid": true, "note": null, "tags": ["boat", "spring"]}',
    "Bees tell each other where the flowers are by dancing. The angle of the dance against the vertical stands for the "
    "angle of the flight against the sun, and its length for the distance. A bee that has flown into the wind dances "
    "as if the way had been longer than it was.",
    "# Packing list\n\n- tent, pegs, and the small hammer\n- two torches with spare batteries\n- map 47 (the new one)\n"
    "- rice, oats, tea, *no* glass jars\n- first-aid kit: see the list inside the lid\n",
    "The court held that a promise made in anger is still a promise, but that the damages must be measured by what the "
    "other side could reasonably have relied on. Since the plaintiff had laughed when it was made, and had told two "
    "witnesses so, the sum awarded was one crown.",
    "At high altitude the air holds less oxygen, and the heart answers by beating faster. Within days the blood makes "
    "more red cells; within weeks the breathing deepens even at rest. Those who are born there have larger lungs and "
    "need none of this.",
    "Why is the sky blue? Because air scatters short waves of light more than long ones, and our eyes see little of "
    "the violet. Why is the sunset red? Because by then the light has crossed so much air that the blue has been "
    "scattered out of it on the way.",
    "SELECT town, COUNT(*) AS visits, AVG(minutes) AS mean_stay\nFROM museum_log\nWHERE year = 2022 AND paid > 0\n"
    "GROUP BY town\nHAVING COUNT(*) > 100\nORDER BY visits DESC;\n",
    "In the photograph a boy stands on a crate behind a market stall, holding a melon that is larger than his head. "
    "The price is written on a piece of slate: two for one fifty. Behind him hang three scales, a calendar and a blue "
    "umbrella with a broken rib.",
    "The committee met twice a month for eleven years and decided three things. First, that there should be a clock. "
    "Second, that it should not strike at night. Third, that the person who winds it should be paid, though it did not "
    "say by whom.",
    "If the pressure falls below 1.8 bar, close valve B, wait for the second click, and open valve C by a quarter "
    "turn. Do not open both at once. Write the time and the reading in the book. The night shift must be told, in "
    "person, of every reading under 1.5.",
    "Er wohnte im dritten Stock, wo man im Winter die Berge sah. La boulangerie ouvre à sept heures, sauf le lundi. El "
    "tren de las nueve llegó tarde, como siempre. Il mercato è aperto fino alle due, ma il pesce finisce prima.",
    "Q: What is the capital of the country whose flag is red with a white cross? A: Bern. Q: Which planet has the "
    "shortest year? A: Mercury, with 88 days. Q: How many sides has a dodecagon? A: Twelve. Q: Who painted this? "
    "A: I cannot tell from the picture.",
    "The old theory said that the glaciers had carried the boulders; the new one says that they were dropped from "
    "icebergs in a lake that has since drained. Both explain the scratches. Only one of them explains why the boulders "
    "stop at the same height, 214 metres, on both slopes.",
    'She learned to sail from her grandmother, who had learned from nobody. "Look at the water, not at the sail," the '
    'old woman used to say. "The sail tells you what the wind is doing. The water tells you what it is about to do."',
)


def prose(seed: int, index: int) -> str:
    """The paragraphs in an order of their own for every seed and index."""
    order = list(PARAGRAPHS)
    random.Random(f"prose/{seed}/{index}").shuffle(order)
    return "\n\n".join(order)
