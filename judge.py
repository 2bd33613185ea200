"""The judge: a language model says which of two answers is better, blind and in both orders.

It sees "A" and "B", never which model's documents an answer was written from. A verdict that
changes with the order is a tie.
"""
import json
from collections import Counter
from itertools import combinations

from llm import OK, TEMPLATES, Call, load_template

ROLES = ("baseline", "finetuned")
GRADES = ("a_correct", "a_supported", "b_correct", "b_supported")
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["reason", *GRADES, "better"], "properties": {
    "reason": {"type": "string"}, **{g: {"type": "integer", "enum": [0, 1, 2]} for g in GRADES},
    "better": {"type": "string", "enum": ["A", "B", "tie"]}}}
PARAMS = {"temperature": 0, "max_tokens": 500,
          "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}}
INVALID = "no valid verdict"


def parse(text) -> dict:
    """The verdict in a reply: the first JSON object in it, with every field of SCHEMA. ValueError says what is wrong."""
    if "{" not in text:
        raise ValueError("there is no JSON object")
    try:
        value, _ = json.JSONDecoder().raw_decode(text[text.index("{"):])
    except RecursionError:
        raise ValueError("it is nested too deep")
    for name in SCHEMA["required"]:
        allowed = SCHEMA["properties"][name].get("enum")
        if name not in value:
            raise ValueError(f'the field "{name}" is missing')
        if allowed and (isinstance(value[name], bool) or value[name] not in allowed) or not allowed and not isinstance(value[name], str):
            raise ValueError(f'the field "{name}" must be {"one of " + str(allowed) if allowed else "text"}')
    return value


def differs(r) -> bool:
    """Whether a record of stage 3 has something to judge: two answers that differ, from contexts that differ."""
    replies = [r[role]["reply"] for role in ROLES]
    return not r["same_context"] and all(a.status == OK for a in replies) and replies[0].text != replies[1].text


def calls_of(r, args) -> list[Call]:
    """The calls that judge one record: args.judge_repeats times baseline first, then fine-tuned first."""
    render = load_template(TEMPLATES / "judge.txt.j2", ("query", "gold", "answers"))
    sides = {role: {"text": r[role]["reply"].text, "documents": r[role]["documents"]} for role in ROLES}
    prompts = [render(query=r["query"], gold=r["gold_documents"][:args.context_k], answers=[(x, sides[role]) for x, role in zip("AB", order)])
               for order in (ROLES, ROLES[::-1])]
    return [Call(args.judge, ({"role": "user", "content": p},), PARAMS, n) for n in range(args.judge_repeats) for p in prompts]


def judge(server, records, args) -> list[Call]:
    """Give each record that has something to judge its "judgement", see combine(); the calls that it took.

    A reply that is no valid verdict gets one repair try.
    """
    records = [r for r in records if differs(r)]
    calls = [c for r in records for c in calls_of(r, args)]
    replies = server.run(calls, "judge")
    verdicts, repairs = [], {}
    for i, (call, reply) in enumerate(zip(calls, replies)):
        verdicts.append((None, reply.status))
        if reply.status == OK:
            try:
                verdicts[i] = (parse(reply.text), OK)
            except ValueError as e:
                ask = f"That is not what was asked for: {e}. Reply with the JSON object and nothing else."
                repairs[i] = call._replace(messages=(*call.messages, {"role": "assistant", "content": reply.text},
                                                     {"role": "user", "content": ask}))
    for i, reply in zip(repairs, server.run(list(repairs.values()), "judge, asked again")):
        try:
            verdicts[i] = (parse(reply.text), OK) if reply.status == OK else (None, reply.status)
        except ValueError:
            verdicts[i] = (None, INVALID)
    size = 2 * args.judge_repeats
    for n, r in enumerate(records):
        r["judgement"] = combine(verdicts[n * size:(n + 1) * size])
    return calls + list(repairs.values())


def combine(verdicts) -> dict:
    """One judgement from [(verdict or None, status)] in the order of calls_of().

    "verdict" is "baseline", "finetuned" or "tie": the majority of the repeats, each a tie unless both
    orders agree; None, with a "status", if no repeat has both orders. Grades are means, 0 to 2.
    "flipped" is the share of repeats that changed with the order, "agreement" the share of pairs of
    repeats that agree (None for a single one).
    """
    pairs = [(a, b) for (a, _), (b, _) in zip(verdicts[::2], verdicts[1::2]) if a and b]
    if not pairs:
        return {"verdict": None, "status": next(s for v, s in verdicts if v is None)}
    sides = {"A": ROLES, "B": ROLES[::-1], "tie": ("tie", "tie")}
    first, second = ([sides[p[n]["better"]][n] for p in pairs] for n in (0, 1))
    each = [a if a == b else "tie" for a, b in zip(first, second)]
    top, count = Counter(each).most_common(1)[0]
    twos = [a == b for a, b in combinations(each, 2)]
    out = {"verdict": top if 2 * count > len(each) else "tie", "status": OK, "reason": pairs[0][0]["reason"].strip(),
           "flipped": sum(a != b for a, b in zip(first, second)) / len(pairs), "agreement": sum(twos) / len(twos) if twos else None}
    for grade in ("correct", "supported"):
        for role, letters in zip(ROLES, ("ab", "ba")):
            out[f"{role}_{grade}"] = sum(p[n][f"{letters[n]}_{grade}"] for p in pairs for n in (0, 1)) / (2 * len(pairs))
    return out


def summarise(records, args) -> dict:
    """Over all records: how many were judged, mean grades, and the judge's own noise."""
    def mean(values):
        return sum(values) / len(values) if values else None
    done = [r["judgement"] for r in records if r.get("judgement", {}).get("verdict")]
    return {"model": args.judge, "repeats": args.judge_repeats, "judged": len(done), "flipped": mean([j["flipped"] for j in done]),
            "agreement": mean([j["agreement"] for j in done if j["agreement"] is not None])} | {
        grade: {role: mean([j[f"{role}_{grade}"] for j in done]) for role in ROLES} for grade in ("correct", "supported")}
