"""/explain/{id}: why a message cost what it cost, from accept to the invoice line."""

from __future__ import annotations

from typing import Literal

import msgspec

from nightmail.rules.explain import MessageStory, tell_message
from nightmail.store.explain_message import explain_message
from nightmail.web.operation import Call, Operation, Reply
from nightmail.web.problems import not_found


class Explanation(msgspec.Struct, kw_only=True):
    """A message's story: in sentences, and as the facts they are made of."""

    id: str
    sentences: list[str]
    message: MessageStory
    object: Literal["explanation"] = "explanation"


async def explain(call: Call[None]) -> Reply:
    """Say how a message was rated, what was reserved and charged for it, and what Stripe was told of its month.

    A key sees the messages of its org and env, the operator all.
    """
    key = call.caller
    async with call.services.database.connection() as conn:
        story = await explain_message(
            conn, call.ids["id"], org_id=key.org_id if key else None, env=key.env if key else None
        )
    if story is None:
        raise not_found("Message")
    return Reply(Explanation(id=str(story.id), sentences=tell_message(story), message=story))


OPERATIONS = (
    Operation(
        method="GET", path="/explain/{id}", handler=explain, summary="Explain a message", access="full_or_admin",
        tag="Usage", path_kinds={"id": "uuid"}, reply=Explanation, errors=(404,),
    ),
)  # fmt: skip
