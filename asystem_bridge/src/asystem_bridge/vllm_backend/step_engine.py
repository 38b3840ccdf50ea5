"""vLLM's in-process engine behind the pool's seam: one ``poll`` is one scheduler step.

Ring-1T section 2.3.3.  Each sampled token comes with the log-prob of the distribution it was drawn
from: temperature 1, no top-k or top-p, vLLM's raw log-probs.  The recipe samples at temperature 1
only; any other would need vLLM's processed log-probs.

Requests are token ids.  They stop at the given end-of-text tokens, which are part of the completion
since the policy chose them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from asystem_bridge.errors import BridgeError
from megatron_c3po.engine import Delta, Submission

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine


class StepEngine:
    """Implements ``megatron_c3po.engine.RolloutEngine``.

    Args:
        engine: in-process, without asynchronous scheduling.
        eos_token_ids: tokens that end a completion.
    """

    def __init__(self, engine: LLMEngine, eos_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._eos_token_ids = list(eos_token_ids)
        self._uid_of: dict[str, str] = {}  # request id -> rollout uid
        self._request_of: dict[str, str] = {}
        self._requests_made = 0

    @property
    def unfinished(self) -> list[str]:
        """Uids of the rollouts under way."""
        return list(self._request_of)

    def submit(self, submissions: Iterable[Submission]) -> None:
        """Hand requests to the scheduler; they start at the next ``poll``.

        Raises:
            BridgeError: a rollout with this uid is under way.
        """
        for submission in submissions:
            if submission.uid in self._request_of:
                raise BridgeError(
                    f"rollout {submission.uid} was submitted twice; abort it before resuming it"
                )
            request_id = self._add(
                submission.uid,
                submission.token_ids,
                SamplingParams(
                    temperature=1.0,
                    seed=submission.seed,
                    max_tokens=submission.max_new_tokens,
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                    ignore_eos=True,  # the tokens below are the whole rule
                    stop_token_ids=self._eos_token_ids,
                ),
            )
            self._uid_of[request_id] = submission.uid
            self._request_of[submission.uid] = request_id

    def poll(self) -> list[Delta]:
        """One scheduler step; an empty list when nothing is under way."""
        if not self._request_of:
            return []
        deltas = []
        for output in self._step():
            uid = self._uid_of.get(output.request_id)
            if uid is None:
                continue
            completion = output.outputs[0]
            token_ids = list(completion.token_ids)
            candidates = completion.logprobs or []  # per token: the sampled one's, by its id
            logprobs = [
                by_token[token_id].logprob
                for by_token, token_id in zip(candidates, token_ids, strict=True)
                if by_token is not None
            ]
            if output.finished:
                self._forget(uid)
            if token_ids or output.finished:
                deltas.append(
                    Delta(
                        uid=uid,
                        token_ids=token_ids,
                        logprobs=logprobs,
                        finish_reason=completion.finish_reason if output.finished else None,
                    )
                )
        return deltas

    def abort(self, uids: Iterable[str]) -> None:
        """Drop unfinished rollouts and free their keys and values."""
        request_ids = [self._request_of[uid] for uid in uids if uid in self._request_of]
        self._engine.abort_request(request_ids)
        for request_id in request_ids:
            self._forget(self._uid_of[request_id])

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The most likely completion of each prompt, its end-of-text token included."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=True,
            stop_token_ids=self._eos_token_ids,
        )
        outputs = self._run("greedy", prompts, params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of tokens 1 .. n-1 of each sequence given those before it.

        Computed afresh: the prefix cache is not read.
        """
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,  # the least that vLLM allows
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
        )
        outputs = self._run("prompt_logprobs", sequences, params)
        return [
            [
                candidates[token_id].logprob
                for candidates, token_id in zip(
                    (output.prompt_logprobs or [])[1:], sequence[1:], strict=True
                )
                if candidates is not None
            ]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def _run(
        self, purpose: str, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[RequestOutput]:
        """Finish some requests while no rollout is under way; outputs in the prompts' order."""
        if self._request_of:
            raise BridgeError(
                f"{purpose} while {len(self._request_of)} rollouts are under way; abort them first"
            )
        order = {
            self._add(purpose, list(prompt), params.clone()): position
            for position, prompt in enumerate(prompts)
        }
        finished: dict[int, RequestOutput] = {}
        while len(finished) < len(order):
            for output in self._step():
                if output.finished:
                    finished[order[output.request_id]] = output
        return [finished[position] for position in range(len(order))]

    def _step(self) -> list[RequestOutput]:
        return cast("list[RequestOutput]", self._engine.step())  # no request pools

    def _add(self, label: str, token_ids: list[int], params: SamplingParams) -> str:
        # A request id is never used twice: a resumed rollout cannot get its former self's output.
        self._requests_made += 1
        request_id = f"{label}#{self._requests_made}"
        self._engine.add_request(request_id, tokens_input(token_ids), params)
        return request_id

    def _forget(self, uid: str) -> None:
        del self._uid_of[self._request_of.pop(uid)]
