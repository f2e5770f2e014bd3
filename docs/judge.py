"""A judge as a reward: another model says whether an answer means the same as the right one.

    export JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL=Qwen/Qwen3-8B
    torchrun train.py visualthinker_sat 'rewards={docs/judge.py:judge: 1, format: 0.5}'

JUDGE_KEY is the name of the environment variable that holds the server's key, if it needs one.
The judge reads the answer between the tags, not the reasoning, so a completion cannot argue with it.
"""

import os

from data.answers.parser import extract
from grpo.serving.client import Client, Server
from grpo.serving.messages import Request

QUESTION = """Question: {question}
Right answer: {right}
Given answer: {given}
Does the given answer mean the same as the right answer? Reply with yes or no only."""

# of a given answer, characters; a longer one is wrong
LONGEST = 200

server = Server(os.environ["JUDGE_URL"], os.environ["JUDGE_MODEL"], os.environ.get("JUDGE_KEY"), timeout=60)
client = Client(server)


async def judge(text, example, length):
    found = extract(text, example.choices)
    if found.why or len(found.answer) > LONGEST:
        return 0.0, {"unread": 0}
    asked = QUESTION.format(question=example.question, right=example.answer, given=found.answer)
    reply = await client.areply(Request(asked, max_tokens=2000))
    if reply.error:
        # a reward of 0 would teach that the answer is wrong
        raise RuntimeError(f"the judge does not reply: {reply.error}")
    verdict = reply.text.strip(" .*\n").lower()
    return float(verdict == "yes"), {"unread": float(verdict not in ("yes", "no"))}


# seconds of a call, with the client's retries
judge.timeout = 400
# shares that are logged as rewards/docs/judge.py:judge/unread/mean
judge.metrics = ["unread"]
