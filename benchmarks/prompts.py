"""32 conversations of the length and kind that people have with a small chat model: offline.py's workload.

Rendered with SmolLM2's chat template they have 32 to 396 tokens, 4,719 in all, the first eight 924.
"""

Message = dict[str, str]

_TIDE = (
    "Twice a day the harbour empties. At eleven the boats still swing on their moorings, and by half past "
    "two they lie "
    "on their sides in the mud with their rudders in the air. The fishermen use the hours in between: they "
    "scrape "
    "weed from the hulls, mend nets on the quay and wait for the water to lift them off again. Visitors "
    "who park "
    "below the sea wall learn about the tide in a more expensive way."
)
_BREAD = (
    "Mix 500 g of flour with 10 g of salt and 350 g of lukewarm water in which you have dissolved 5 g of "
    "yeast. Leave "
    "the dough for twenty minutes, fold it four times, and put it in the fridge overnight. In the morning "
    "shape it "
    "without pressing the gas out, let it rise for an hour in a floured basket and bake it in a covered "
    "pot at 240 "
    "degrees for half an hour. Take off the lid and bake it for another fifteen minutes, until the crust "
    "is dark. "
    "Do not cut it while it is hot, however good it smells: the crumb is still setting."
)
_MEETING = (
    "Anna opened the meeting at nine. The new billing service went live on Monday and has handled forty "
    "thousand "
    "invoices; three customers were charged twice because a retry did not check whether the first call had "
    "gone "
    "through. Bilal has written a fix that stores a key with each charge, and it will be released after "
    "the tests on "
    "Thursday. Chen reported that the search index takes six hours to rebuild, up from two in March, "
    "mostly because "
    "every product is now kept in eleven languages. She will try to rebuild only what has changed. Dora "
    "asked whether "
    "the old reporting database can be switched off. Nobody knows who still reads it, so she will log its "
    "queries "
    "for two weeks and write to everyone who appears there. The team agreed to move the release freeze for "
    "the "
    "holidays one week forward, to the eleventh of December, because the auditors come on the fourteenth. "
    "Bilal will "
    "be away from the first to the fifth and Chen stands in for him. The next meeting is on Thursday at "
    "ten, not at "
    "nine, because of the fire drill."
)
_MOON = (
    "Neptune's largest moon, Triton, goes round its planet the wrong way. Every other large moon in the "
    "solar system "
    "moves in the direction in which its planet turns, because it formed from the same disc of gas and "
    "dust. Triton "
    "must have come from somewhere else, and the most likely place is the Kuiper belt, the home of Pluto. "
    "Perhaps it "
    "arrived as one half of a pair: Neptune kept one and threw the other out, and the energy that one lost "
    "the other "
    "carried away. The capture would have scattered whatever moons were there before, which explains why "
    "Neptune has "
    "so few regular ones. Far outside, on long and tilted paths, small bodies such as Halimede, Sao and "
    "Neso take "
    "years for one turn. Some of them may be pieces of older moons that met each other in those days."
)
_LETTER = (
    "Dear Sir or Madam, on the third of May I ordered a standing desk in oak from your shop, order number "
    "48213. It "
    "came on the nineteenth, a week late, and the box had a hole in one side. The table top has a scratch "
    "of about "
    "thirty centimetres, one of the two motors does not run, and the bag with the screws for the left leg "
    "was missing. "
    "I wrote to you on the same day and again a week later. Both times I got an automatic reply that "
    "promised an "
    "answer in two working days. I would still like to keep the desk, because it fits the room well. "
    "Please send me a "
    "new top, a motor and the screws before the end of the month, or tell me how I can return everything "
    "and get my "
    "money back. I have added four photographs. Yours faithfully, M. Okafor"
)
_CODE = (
    "def moving_average(values, size):\n"
    "    result = []\n"
    "    for i in range(len(values)):\n"
    "        window = values[i - size:i]\n"
    "        result.append(sum(window) / size)\n"
    "    return result\n"
)
_GARDEN = (
    "The north side of the house gets two hours of sun in June and none in December. The soil is heavy "
    "clay, wet until "
    "May and hard as brick in August. There is a downpipe without a barrel, a fence that my neighbour "
    "wants to keep, "
    "and a pear tree that nobody has cut for ten years. I have one free afternoon a week and would like to "
    "see flowers "
    "from the kitchen window, a place for a table, and no lawn to mow."
)
_HISTORY = (
    "Before there were clocks in every house, towns kept their own time. Noon was when the sun stood "
    "highest over the "
    "church, so that noon in Bristol came ten minutes after noon in London, and nobody minded, because no "
    "one could "
    "travel fast enough to notice. The railways changed that. A timetable needs one time for the whole "
    "line, and by "
    "1847 most British companies had agreed to use the time of the observatory in Greenwich, sent down the "
    "wires by "
    "telegraph. Some towns put two minute hands on their clocks, one for the trains and one for the sun. "
    "The law "
    "followed only in 1880. Larger countries could not do with a single time. In the United States more "
    "than fifty "
    "railway times were in use when the companies drew four zones over the map in 1883, and for one Sunday "
    "in November "
    "some cities had noon twice."
)


def _ask(text: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": text}]


def _follow_up(first: str, answer: str, second: str) -> list[Message]:
    return [*_ask(first), {"role": "assistant", "content": answer}, {"role": "user", "content": second}]


CHATS: tuple[list[Message], ...] = (
    _ask("Why is the sky blue?"),
    _ask(
        "Give me three names for a grey cat and say in one sentence why each of them fits. She is shy, "
        "sleeps in the "
        "sink and only comes when somebody opens a tin. The names should have two syllables and not sound "
        "alike."
    ),
    _ask(f"Summarize in two sentences.\n\n{_TIDE}"),
    _ask("Hello!"),
    _ask(f"Who has to do what until when? Answer as a table.\n\n{_MEETING}"),
    _ask(f"Find the bug in this function and correct it.\n\n{_CODE}", "You are a careful programmer."),
    _follow_up(
        "What is the capital of Australia?",
        "The capital of Australia is Canberra.",
        "Why is it not Sydney, which is so much larger? And was there a reason to build a new city so far "
        "from the "
        "coast? Please name the year of the decision.",
    ),
    _ask(f"Which moons are named here, and what is said about each of them?\n\n{_MOON}"),
    _ask("Explain to a ten-year-old how a rainbow is made, without the words refraction and wavelength."),
    _ask(f"Write the recipe as a numbered list with times.\n\n{_BREAD}"),
    _ask(
        f"Answer this letter for the shop: apologize, offer the parts and a date.\n\n{_LETTER}",
        "You write for the customer service of a furniture shop. You are polite and short and never promise "
        "anything that is not in stock: table tops are, motors come in two weeks, screws are free.",
    ),
    _ask("What is 17 times 23? Show the steps."),
    _ask(f"Draw up a plan for this garden, month by month.\n\n{_GARDEN}"),
    _ask(f"What are the three most important dates in this text, and what happened then?\n\n{_HISTORY}"),
    _ask(
        "Translate into French: The train to Lyon leaves at a quarter past eight from platform four. "
        "Passengers with a "
        "reservation find their coach on the blue boards. Because of work on the line it will not stop in "
        "Dijon today; "
        "buses wait in front of the station."
    ),
    _ask(f"Summarize the minutes in five bullet points for someone who was ill.\n\n{_MEETING}\n\nThank you!"),
    _follow_up(
        f"Can I bake this on a stone instead of in a pot?\n\n{_BREAD}",
        "Yes. Heat the stone for an hour, slide the loaf onto it and throw a cup of water on the floor of "
        "the oven, "
        "so that the crust stays soft while the bread rises.",
        "And if I have only whole-grain flour? What do I change, and what should I expect of the crumb?",
    ),
    _ask(
        "Is it better to learn the guitar or the piano first? Give two arguments for each and then decide. "
        "I am "
        "forty-two, can read music a little from singing in a choir, live in a flat with thin walls and "
        "have half an "
        "hour in the evening."
    ),
    _ask(f"Write the first paragraph of a crime story that begins in this place.\n\n{_TIDE}"),
    _ask(f"Write a quiz of five questions with answers about this text.\n\n{_MOON}\n\n{_HISTORY}"),
    _ask("Write a regular expression for dates like 2024-05-31 and explain each part of it."),
    _ask(f"Make this letter half as long and twice as friendly.\n\n{_LETTER}"),
    _ask(
        "List five things to check before a long drive in winter. The car is twelve years old, stands "
        "outside and has "
        "not been further than the supermarket since October."
    ),
    _ask(
        f"Which plants would you choose, and where would the table stand?\n\n{_GARDEN}\n\nI live near "
        f"Hamburg."
    ),
    _ask(f"Explain the word 'noon' as it is used here. Why could a city have it twice?\n\n{_HISTORY}"),
    _ask(f"Write tests with pytest for this function. What should it do for an empty list?\n\n{_CODE}"),
    _ask(
        "Tell me a joke about a database administrator.",
        "You are a comedian who used to be an engineer. You explain every joke afterwards, which makes it "
        "worse.",
    ),
    _ask(
        f"Write a mail to the auditors that says which of these points concern them.\n\n{_MEETING}",
        "You are the assistant of a small software company. Write plain English and no more than ten lines.",
    ),
    _ask(f"How sure is science about this? Sort the statements by how certain they are.\n\n{_MOON}"),
    _follow_up(
        "How do I remove red wine from a white tablecloth?",
        "Blot it with a dry cloth, do not rub. Pour sparkling water on the stain and blot again. Then soak "
        "the cloth "
        "in cold water with a spoon of soda for an hour and wash it as hot as the label allows.",
        "The stain is a week old. Is there anything left to try?",
    ),
    _ask(f"Turn this recipe into a shopping list for four loaves.\n\n{_BREAD}"),
    _ask(
        "Compare a bicycle, a bus and a car for a way to work of six kilometres, in one short paragraph each."
    ),
)
