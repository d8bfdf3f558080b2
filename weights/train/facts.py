"""Conversations that come back to what was said long ago: facts told, other talk, questions about them.

    python facts.py --out facts.jsonl.xz --filler train-chat.jsonl.xz --n 3000

Books and everyday chat ask almost nothing of a model's memory beyond a window. Here a user mentions
facts about people (drawn from the lists below, so that no answer can be guessed), talks of other things (exchanges
of --filler) and asks again, many times in one conversation and at many distances. Some rows are
notes in plain prose instead. probe.py's question is of neither form.
"""
import argparse
import json
import random
from pathlib import Path

from corpus import open_text

NAMES = ("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Umar Vera Will "
         "Yara Zoe Omar Nina Hugo Eva Carl Lucy George Fiona Martin Julia Oscar Irene Tom Susan Ravi Mei Kenji Aisha").split()
PLACES = ("Lisbon Oslo Boston Cairo Madrid Dublin Chicago Prague Sydney Toronto Nairobi Berlin Athens Denver Kyoto Lima "
          "Geneva Seattle Warsaw Delhi Naples Austin Bergen Porto Quebec Hanoi").split()
JOBS = ("nurse baker teacher pilot lawyer farmer plumber chemist painter editor gardener librarian carpenter dentist "
        "electrician translator photographer mechanic firefighter tailor").split()
COLOURS = "red blue green yellow purple pink brown black white grey turquoise gold".split()
FOODS = ("pasta sushi pancakes soup pizza rice salad curry cheese chocolate bread noodles dumplings tacos").split()
ANIMALS = "cat dog parrot hamster turtle pony goldfish lizard goat ferret".split()
HOBBIES = "chess climbing knitting sailing cycling painting baking fishing running dancing pottery skating".split()
INSTRUMENTS = "piano flute guitar cello trumpet harp drums clarinet banjo accordion".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()


def number(rng):
    return str(rng.randrange(100, 10000))


# how it is told of {n}, how it is told of oneself, what is asked of {n}, of oneself, the answers; {v} the value
KINDS = (
    (PLACES, "{n} lives in {v}", "I live in {v}", "Where does {n} live?", "Where do I live?", "{n} lives in {v}.", "You live in {v}."),
    (JOBS, "{n} works as a {v}", "I work as a {v}", "What is {n}'s job?", "What do I do for a living?",
     "{n} works as a {v}.", "You work as a {v}."),
    (COLOURS, "{n}'s favourite colour is {v}", "my favourite colour is {v}", "What is {n}'s favourite colour?",
     "What is my favourite colour?", "{n}'s favourite colour is {v}.", "Your favourite colour is {v}."),
    (FOODS, "{n} loves to eat {v}", "I love to eat {v}", "What does {n} love to eat?", "What food do I love?",
     "{n} loves to eat {v}.", "You love to eat {v}."),
    (ANIMALS, "{n} has a {v}", "I have a {v}", "What pet does {n} have?", "What pet do I have?", "{n} has a {v}.", "You have a {v}."),
    (HOBBIES, "{n} enjoys {v}", "I enjoy {v}", "What does {n} enjoy?", "What do I enjoy in my free time?",
     "{n} enjoys {v}.", "You enjoy {v}."),
    (INSTRUMENTS, "{n} plays the {v}", "I play the {v}", "Which instrument does {n} play?", "Which instrument do I play?",
     "{n} plays the {v}.", "You play the {v}."),
    (DAYS, "{n} visits us on {v}", "I go to the market on {v}", "On which day does {n} visit?",
     "On which day do I go to the market?", "{n} visits on {v}.", "You go to the market on {v}."),
    (MONTHS, "{n} was born in {v}", "I was born in {v}", "In which month was {n} born?", "In which month was I born?",
     "{n} was born in {v}.", "You were born in {v}."),
    (number, "{n}'s room number is {v}", "my door code is {v}", "What is {n}'s room number?", "What is my door code?",
     "{n}'s room number is {v}.", "Your door code is {v}."),
    (NAMES, "{n} has a sister called {v}", "my best friend is called {v}", "What is the name of {n}'s sister?",
     "What is my best friend called?", "{n}'s sister is called {v}.", "Your best friend is called {v}."),
)
TOLD = ("Just so you know, {}.", "{}.", "By the way, {}.", "Please remember that {}.", "I should mention that {}.", "One more thing: {}.")
HEARD = ("Thank you, I will remember that.", "Good to know!", "Noted.", "Thanks for telling me.", "I see, I will keep it in mind.")
ASKED = ("{}", "{}", "Do you remember? {}", "I forgot: {}", "Quick question. {}")


class Fact:
    def __init__(self, rng, known):
        """One whose question has no other answer among `known`."""
        while True:
            values, of_n, of_me, ask_n, ask_me, say_n, say_me = kind = rng.choice(KINDS)
            name = rng.choice(NAMES) if rng.random() < 0.7 else None
            self.key = (KINDS.index(kind), name)
            if self.key not in known:
                break
        value = values(rng) if callable(values) else rng.choice(values)
        fill = {"n": name, "v": value}
        self.telling, self.question, self.answer = (
            text.format(**fill) for text in ((of_n, ask_n, say_n) if name else (of_me, ask_me, say_me)))


def capital(text):
    return text[:1].upper() + text[1:]


def talk(rng, filler, turns):
    """Messages of a conversation: about a third tells, a third asks, a third is about something else."""
    facts, messages, told = {}, [], []

    def say(user, assistant):
        messages.extend(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}))

    for _ in range(turns):
        at = rng.random()
        if not told or (at < 0.33 and len(told) < 24):
            new = [Fact(rng, facts) for _ in range(rng.choice((1, 1, 2, 3)))]
            new = list({fact.key: fact for fact in new}.values())
            facts.update((fact.key, fact) for fact in new)
            told += new
            say(" ".join(capital(rng.choice(TOLD).format(fact.telling)) for fact in new), rng.choice(HEARD))
        elif at < 0.66:
            fact = rng.choice(told)
            say(rng.choice(ASKED).format(fact.question), fact.answer)
        else:
            messages.extend(rng.choice(filler))
    return messages


def notes(rng, filler, lines):
    """Prose: statements between paragraphs of something else, some of them repeated later in full."""
    facts, told, parts = {}, [], []
    for _ in range(lines):
        at = rng.random()
        if not told or at < 0.4:
            fact = Fact(rng, facts)
            facts[fact.key] = fact
            told.append(fact)
            parts.append(fact.answer if fact.key[1] else capital(fact.telling) + ".")
        elif at < 0.8:
            fact = rng.choice(told)
            parts.append(f"Question: {fact.question} Answer: {fact.answer}" if rng.random() < 0.5
                         else fact.answer if fact.key[1] else capital(fact.telling) + ".")
        else:
            parts.append(rng.choice(filler)[0]["content"])
    return [{"role": "user", "content": "Read these notes.\n\n" + "\n\n".join(parts)}, {"role": "assistant", "content": rng.choice(HEARD)}]


def exchanges(path, longest):
    """Pairs of messages of other conversations, each shorter than `longest` characters."""
    found = []
    with open_text(path) as file:
        for line in file:
            messages = json.loads(line)["messages"]
            for user, answer in zip(messages, messages[1:]):
                if user["role"] == "user" and max(len(user["content"]), len(answer["content"])) < longest:
                    found.append([user, answer])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help=".jsonl or .jsonl.xz")
    parser.add_argument("--filler", type=Path, required=True, help="a .jsonl of conversations")
    parser.add_argument("--n", type=int, default=3000, help="conversations")
    parser.add_argument("--longest", type=int, default=600, help="characters of a message of filler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    filler = exchanges(args.filler, args.longest)
    with open_text(args.out, "wt") as out:
        for _ in range(args.n):
            turns = rng.randrange(20, 90)
            made = talk(rng, filler, turns) if rng.random() < 0.75 else notes(rng, filler, turns)
            out.write(json.dumps({"messages": made, "source": "facts.py"}) + "\n")


if __name__ == "__main__":
    main()
