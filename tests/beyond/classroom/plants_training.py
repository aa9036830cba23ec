"""Mistakes planted in `generate`, the optimizer, the classifiers and the loading."""

from collections.abc import Iterator

from tests.beyond.classroom.planting import Plant, Row, rows

REAL = "(input_ids != 3).sum(dim=-1)"
# ---------------------------------------------------------------------------- generate, in ours
SOFTMAX = "return F.softmax(logits / temperature, dim=-1)"
DRAW = "return torch.multinomial(token_probabilities(logits, temperature), 1, generator=generator)"
ARGMAX = "return max_logits(logits)[1]"
CROP = "context = idx[:, -self.config.max_seq_len :]"
APPEND = "idx = torch.cat((idx, next_token), dim=1)  # (batch, seq + 1)"
LOOP = "for _ in range(max_new_tokens):"
OURS_GENERATE: tuple[Row, ...] = (
    ("temperature multiplied", SOFTMAX, "return F.softmax(logits * temperature, dim=-1)"),
    ("temperature has no effect", SOFTMAX, "return F.softmax(logits, dim=-1)"),
    (
        "softmax before and after the temperature",
        SOFTMAX,
        "return F.softmax(F.softmax(logits, dim=-1) / temperature, dim=-1)",
    ),
    (
        "softmax applied twice",
        SOFTMAX,
        "return F.softmax(logits / temperature, dim=-1).softmax(dim=-1)",
    ),
    ("softmax left out", DRAW, "return torch.multinomial(logits / temperature, 1)"),
    ("softmax over the batch", SOFTMAX, "return F.softmax(logits / temperature, dim=0)"),
    ("always the argmax", "if temperature == 0:", "if temperature >= 0:"),
    ("random at temperature 0", ARGMAX, "temperature = 1.0"),
    ("least likely token at temperature 0", ARGMAX, "return logits.argmin(dim=-1, keepdim=True)"),
    ("argmax over the whole tensor", ARGMAX, "return logits.argmax().expand(len(logits), 1)"),
    (
        "works for one row only at temperature 0",
        ARGMAX,
        "return max_logits(logits)[1].flatten()[None]",
    ),
    (
        "works for one row only above temperature 0",
        DRAW,
        DRAW.replace("logits, temperature), 1", "logits, temperature)[0], 1") + "[None]",
    ),
    (
        "one draw for all rows",
        DRAW,
        "one = torch.multinomial(token_probabilities(logits, temperature)[0], 1)\n"
        "    return one.repeat(len(logits), 1)",
    ),
    (
        "unlikely tokens cut off (top-k)",
        SOFTMAX,
        "least = logits.topk(min(200, logits.shape[-1]))[0][:, -1:]\n"
        "    logits = logits.masked_fill(logits < least, -torch.inf)\n    " + SOFTMAX,
    ),
    (
        "epsilon sampling",
        SOFTMAX,
        "probs = F.softmax(logits / temperature, dim=-1)\n    return probs * (probs >= 0.05)",
    ),
    ("cropped from the wrong end", CROP, "context = idx[:, : self.config.max_seq_len]"),
    ("not cropped", CROP, "context = idx"),
    (
        "cropped to one token too few",
        CROP,
        "context = idx[:, -(self.config.max_seq_len - 1) :]",
    ),
    (
        "the result loses its beginning",
        APPEND,
        "idx = torch.cat((idx[:, -self.config.max_seq_len :], next_token), dim=1)",
    ),
    (
        "only the newest token is fed back",
        CROP,
        "context = idx[:, -self.config.max_seq_len :] if _ == 0 else idx[:, -1:]",
    ),
    (
        "stops early, at EOS",
        APPEND,
        f"{APPEND}\n                if (next_token == 2).all():\n                    break",
    ),
    (
        "stops early, at BOS",
        APPEND,
        f"{APPEND}\n                if (next_token == 1).all():\n                    break",
    ),
    ("the context counts as new tokens", LOOP, "while idx.shape[1] < max_new_tokens:"),
    (
        "only the new tokens are returned",
        "        return idx\n",
        "        return idx[:, -max_new_tokens:]\n",
    ),
    ("leaves the model in eval mode", "self.train(was_training)", "pass"),
)
PROBS = "probs = F.softmax(logits / temperature, dim=-1)"
COURSE_GENERATE: tuple[Row, ...] = (
    ("temperature multiplied", PROBS, "probs = F.softmax(logits * temperature, dim=-1)"),
    ("temperature has no effect", PROBS, "probs = F.softmax(logits, dim=-1) / temperature"),
    ("softmax left out", PROBS, "probs = logits / temperature"),
    ("softmax over the batch", PROBS, "probs = F.softmax(logits / temperature, dim=0)"),
    (
        "softmax applied twice",
        "idx_next = torch.multinomial(probs, num_samples=1)",
        "idx_next = torch.distributions.Categorical(logits=probs).sample()[:, None]",
    ),
    (
        "always the argmax",
        "idx_next = torch.multinomial(probs, num_samples=1)",
        "idx_next = probs.argmax(dim=-1, keepdim=True)",
    ),
    (
        "works for one row only at temperature 0",
        "idx_next = torch.argmax(logits, dim=-1, keepdim=True)",
        "idx_next = torch.tensor([[logits.argmax().item()]])",
    ),
    (
        "only one token is generated",
        "            idx = torch.cat((idx, idx_next), dim=1)\n        return idx\n",
        "            idx = torch.cat((idx, idx_next), dim=1)\n            return idx\n",
    ),
    (
        "nucleus sampling (top-p)",
        PROBS,
        "ranked, order = (logits / temperature).softmax(-1).sort(descending=True)\n"
        "                ranked[:, 1:] *= ranked.cumsum(-1)[:, 1:] < 0.9\n"
        "                probs = torch.zeros_like(ranked).scatter(1, order, ranked)",
    ),
    ("no case for temperature 0", "if temperature == 0.0:", "if False:"),
    ("not cropped", "context = idx[:, -self.params.max_seq_len :]", "context = idx"),
    (
        "nucleus sampling (top-p)",
        PROBS,
        "ranked, order = (logits / temperature).sort(descending=True)\n"
        "                ranked = ranked.softmax(-1)\n"
        "                ranked[ranked.cumsum(-1) - ranked > 0.9] = 0\n"
        "                probs = torch.zeros_like(ranked).scatter(1, order, ranked)",
    ),
)
# ---------------------------------------------------------------------------- AdamW, in ours
STEP_SIZE = "step_size *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)"
ROOT = "denominators = torch._foreach_sqrt(exp_avg_sqs)"
EPS = 'torch._foreach_add_(denominators, group["eps"])'
FIRST = "torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)"
SECOND = "torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)"
UPDATE = "torch._foreach_addcdiv_(parameters, exp_avgs, denominators, -step_size)"
COUNT = 'state["step"] += 1'
CALL = "self._update(parameters, step, group)"
DECAY = 'torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])'
NO_DECAY = 'group = {**group, "weight_decay": 0.0}'
STATE = (
    'state["exp_avg"] = torch.zeros_like(parameter)\n'
    '                    state["exp_avg_sq"] = torch.zeros_like(parameter)'
)
SKIP = "if parameter.grad is None:\n                    continue\n"


def made_by(zeros: str) -> str:
    return STATE.replace("torch.zeros_like(parameter)", zeros)


OURS_ADAMW: tuple[Row, ...] = (
    ("no bias correction", STEP_SIZE, "pass"),
    (
        "bias corrected twice (both forms mixed)",
        ROOT,
        'if group["correct_bias"]:\n'
        "            exp_avgs = torch._foreach_div(exp_avgs, 1 - beta1**step)\n"
        "            exp_avg_sqs = torch._foreach_div(exp_avg_sqs, 1 - beta2**step)\n"
        f"        {ROOT}",
    ),
    ("only the first moment's bias corrected", STEP_SIZE, "step_size /= 1 - beta1**step"),
    ("only the second moment's bias corrected", STEP_SIZE, "step_size *= (1 - beta2**step) ** 0.5"),
    (
        "no root in the bias correction",
        STEP_SIZE,
        "step_size *= (1 - beta2**step) / (1 - beta1**step)",
    ),
    (
        "bias correction upside down",
        STEP_SIZE,
        "step_size *= (1 - beta1**step) / (1 - beta2**step) ** 0.5",
    ),
    ("correct_bias=False has no effect", 'if group["correct_bias"]:', "if True:"),
    (
        "correct_bias=False corrects the second moment",
        STEP_SIZE,
        f"{STEP_SIZE}\n        else:\n            step_size *= (1 - beta2**step) ** 0.5",
    ),
    (
        "correct_bias=False ends in an error",
        'step_size = group["lr"]\n        if group["correct_bias"]:',
        'if group["correct_bias"]:\n            step_size = group["lr"]',
    ),
    (
        "eps added after the bias correction",
        EPS,
        'factor = (1 - beta2**step) ** 0.5 if group["correct_bias"] else 1.0\n'
        '        torch._foreach_add_(denominators, group["eps"] * factor)',
    ),
    (
        "eps inside the root",
        f"{ROOT}\n        {EPS}",
        'denominators = torch._foreach_sqrt(torch._foreach_add(exp_avg_sqs, group["eps"]))',
    ),
    ("no eps", EPS, "pass"),
    (
        "no square root of the second moment",
        ROOT,
        "denominators = [v.clone() for v in exp_avg_sqs]",
    ),
    (
        "second moment without the square",
        SECOND,
        "torch._foreach_add_(exp_avg_sqs, grads, alpha=1 - beta2)",
    ),
    (
        "first moment without 1 - beta1",
        FIRST,
        "torch._foreach_mul_(exp_avgs, beta1)\n        torch._foreach_add_(exp_avgs, grads)",
    ),
    (
        "second moment without 1 - beta2",
        SECOND,
        "torch._foreach_addcmul_(exp_avg_sqs, grads, grads)",
    ),
    ("betas swapped", 'beta1, beta2 = group["betas"]', 'beta2, beta1 = group["betas"]'),
    (
        "moments not kept between steps",
        COUNT,
        f'{COUNT}\n                state["exp_avg"].zero_()\n'
        '                state["exp_avg_sq"].zero_()',
    ),
    (
        "plain gradient descent",
        UPDATE,
        'torch._foreach_add_(parameters, grads, alpha=-group["lr"])',
    ),
    ("step never counted on", CALL, "self._update(parameters, 1, group)"),
    ("step counted from 0", CALL, "self._update(parameters, step - 1, group)"),
    ("step counted from 2", CALL, "self._update(parameters, step + 1, group)"),
    (
        "step counted for all parameters together",
        f"for step, parameters in parameters_by_step.items():\n                {CALL}",
        'group["count"] = group.get("count", 0) + 1\n'
        "            for parameters in parameters_by_step.values():\n"
        '                self._update(parameters, group["count"], group)',
    ),
    (
        "group's step counted at every parameter",
        COUNT,
        'group["count"] = group.get("count", 0) + 1\n'
        '                state["step"] = group["count"]',
    ),
    (
        "one step counted at every parameter of all groups",
        COUNT,
        'self.count = getattr(self, "count", 0) + 1\n                state["step"] = self.count',
    ),
    (
        "state shared between parameters",
        "super().__init__(params, defaults)",
        "super().__init__(params, defaults)\n        shared = {}\n"
        "        self.state.default_factory = lambda: shared",
    ),
    ("options of the group ignored", CALL, "self._update(parameters, step, self.defaults)"),
    ("fails for a parameter without a gradient", SKIP, "pass\n"),
    (
        "parameters not changed",
        UPDATE,
        f"parameters = [p.clone() for p in parameters]\n        {UPDATE}",
    ),
    ("update added instead of subtracted", UPDATE, UPDATE.replace("-step_size", "step_size")),
    ("no weight decay", 'if group["weight_decay"]:', "if False:"),
    ("weight decay before the update", UPDATE, f"{DECAY}\n        {UPDATE}\n        {NO_DECAY}"),
    (
        "weight decay inside the gradient (L2)",
        FIRST,
        'grads = torch._foreach_add(grads, parameters, alpha=group["weight_decay"])\n'
        f"        {NO_DECAY}\n        {FIRST}",
    ),
    (
        "weight decay twice",
        FIRST,
        'grads = torch._foreach_add(grads, parameters, alpha=group["weight_decay"])\n'
        f"        {FIRST}",
    ),
    (
        "weight decay times lr / (1 - beta1^t)",
        DECAY,
        DECAY.replace('group["lr"]', 'group["lr"] / (1 - beta1**step)'),
    ),
    ("weight decay not times lr", DECAY, DECAY.replace('group["lr"] * ', "")),
    (
        "weight decay times the corrected step size",
        DECAY,
        DECAY.replace('group["lr"]', "step_size"),
    ),
    ("weight decay with the wrong sign", DECAY, DECAY.replace("1 - ", "1 + ")),
    (
        "state without the parameter's device and dtype",
        STATE,
        made_by("torch.zeros(parameter.shape)"),
    ),
    (
        "state without the parameter's device",
        STATE,
        made_by("torch.zeros(parameter.shape, dtype=parameter.dtype)"),
    ),
    (
        "state without the parameter's dtype",
        STATE,
        made_by("torch.zeros(parameter.shape, device=parameter.device)"),
    ),
    ("gradient changed in place", SECOND, f"{SECOND}\n        torch._foreach_mul_(grads, 2.0)"),
)
ALPHA = "alpha = alpha * math.sqrt(1 - beta2**t) / (1 - beta1**t)"
CHANGE = 'p.data = p.data - alpha * state["m"] / (torch.sqrt(state["v"]) + group["eps"])'
COURSE_DECAY = 'p.data = p.data - group["lr"] * group["weight_decay"] * p.data'
COURSE_STATE = 'state["v"] = torch.zeros_like(p.data)'
COURSE_ADAMW: tuple[Row, ...] = (
    ("no bias correction", ALPHA, "pass"),
    (
        "bias corrected twice (both forms mixed)",
        CHANGE,
        'm, v = state["m"], state["v"]\n'
        '                if group["correct_bias"]:\n'
        "                    m, v = m / (1 - beta1**t), v / (1 - beta2**t)\n"
        '                p.data.add_(-alpha * m / (v.sqrt() + group["eps"]))',
    ),
    (  # whatever correct_bias says
        "bias corrected twice (both forms mixed)",
        CHANGE,
        'm, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)\n'
        '                p.data -= alpha * m / (v.sqrt() + group["eps"])',
    ),
    (
        "only the first moment's bias corrected",
        f'if group["correct_bias"]:\n                    {ALPHA}',
        "alpha = alpha / (1 - beta1**t)",
    ),
    (
        "eps added after the bias correction",
        f'if group["correct_bias"]:\n                    {ALPHA}\n                {CHANGE}',
        'm, v = state["m"], state["v"]\n'
        '                if group["correct_bias"]:\n'
        "                    m, v = m / (1 - beta1**t), v / (1 - beta2**t)\n"
        '                p.data.add_(-alpha * m / (v.sqrt() + group["eps"]))',
    ),
    ("step counted from 2", 'state["step"] = 0', 'state["step"] = 1'),
    ("moments not kept between steps", "if len(state) == 0:", "if True:"),
    (
        "plain gradient descent",
        "state = self.state[p]\n",
        'p.data -= group["lr"] * grad\n                continue\n'
        "                state = self.state[p]\n",
    ),
    ("step counted from 0", 't = state["step"]', 't = state["step"] - 1'),
    ("parameters not changed", CHANGE, "p = p.data.clone()"),
    ("no weight decay", COURSE_DECAY, "pass"),
    (
        "weight decay times the corrected step size",
        COURSE_DECAY,
        COURSE_DECAY.replace('group["lr"]', "alpha"),
    ),
    ("weight decay not times lr", COURSE_DECAY, COURSE_DECAY.replace('group["lr"] * ', "")),
    (
        "weight decay inside the gradient (L2)",
        "grad = p.grad.data\n",
        'grad = p.grad.data + group["weight_decay"] * p.data\n'
        "                group = dict(group, weight_decay=0)\n",
    ),
    (  # v = beta2 * v + ... makes it float64 again
        "state without the parameter's device",
        COURSE_STATE,
        'state["v"] = torch.zeros(p.data.size())',
    ),
    (
        "gradient changed in place",
        "alpha = group",
        "p.grad.data.mul_(2)\n                alpha = group",
    ),
)
# ---------------------------------------------------------------------------- classifiers, in ours
SCORES = "torch.stack([log_probs[:, ids].sum(dim=-1) for ids in self.label_ids], dim=-1)"
POSITIONS = "positions = last_positions(input_ids, lengths, self.llama.config.causal)"
LAST = f"""\
{POSITIONS}
        last = self.llama.compute_hidden(input_ids, positions=positions)[:, 0]  # (batch, dim)
"""
HIDDEN = "hidden = self.llama.compute_hidden(input_ids)\n        "
NORMAL = "log_probs = F.log_softmax(self.llama.output(last.float()), dim=-1)"
FROZEN = "self.llama.requires_grad_(False)"
OURS_ZERO_SHOT: tuple[Row, ...] = (
    ("label score averaged", SCORES, SCORES.replace("sum", "mean")),
    (
        "probabilities instead of log-probabilities",
        NORMAL,
        NORMAL.replace("log_softmax", "softmax"),
    ),
    ("exponentiated scores", SCORES, f"{SCORES}.exp()"),
    ("first token of a label only", SCORES, SCORES.replace("[:, ids]", "[:, ids[:1]]")),
    ("last token of a label only", SCORES, SCORES.replace("[:, ids]", "[:, ids[-1:]]")),
    ("log-probabilities multiplied", SCORES, SCORES.replace("sum", "prod")),
    ("no softmax", NORMAL, "log_probs = self.llama.output(last.float())"),
    ("softmax over the batch", NORMAL, NORMAL.replace("dim=-1", "dim=0")),
    ("softmax over the labels", SCORES, f"{SCORES}.log_softmax(dim=-1)"),
    ("negated scores", SCORES, f"-{SCORES}"),
    ("first column", LAST, f"{HIDDEN}last = hidden[:, 0]\n"),
    ("mean of all columns", LAST, f"{HIDDEN}last = hidden.mean(dim=1)\n"),
    ("column before the last", LAST, f"{HIDDEN}last = hidden[:, -2]\n"),
    (
        "last real token instead of the last column",
        LAST,
        f"{HIDDEN}last = hidden[torch.arange(len(hidden)), {REAL} - 1]\n",
    ),
    (
        "token before the last real one instead of the last column",
        LAST,
        f"{HIDDEN}last = hidden[torch.arange(len(hidden)), {REAL} - 2]\n",
    ),
    ("labels with BOS", "encode(name, bos=False, eos=False)", "encode(name, bos=True, eos=False)"),
    ("parameters not frozen", FROZEN, "pass"),
)
TOTAL = "scores[:, i] = torch.sum(log_probabilities[:, 0, ids], axis=-1)"
COURSE_ZERO_SHOT: tuple[Row, ...] = (
    ("label score averaged", TOTAL, TOTAL.replace("torch.sum", "torch.mean")),
    (
        "probabilities instead of log-probabilities",
        "log_probabilities = F.log_softmax(logits, dim=-1)",
        "log_probabilities = F.softmax(logits, dim=-1)",
    ),
    ("first column", "logits, _ = self.llama(input_ids)", "logits, _ = self.llama(input_ids, 1)"),
)
POOLED = "pooled = self.pool(input_ids, lengths)  # (batch, dim)"
HEAD = "return F.log_softmax(self.classifier_head(self.dropout(pooled.float())), dim=-1)"
DROPPED = "self.dropout(pooled.float())"
TRAINED = 'self.llama.requires_grad_(config.option == "finetune")'
LINEAR = "self.classifier_head = nn.Linear(self.llama.config.dim, config.num_labels)"
POOL = f"""\
{POSITIONS}
        # `forward` would project to the vocabulary too.
        return self.llama.compute_hidden(input_ids, positions=positions)[:, 0]
"""


def pooled(code: str) -> tuple[str, str]:
    return POOL, f"{HIDDEN}return {code}\n"


OURS_CLASSIFIER: tuple[Row, ...] = (
    ("probabilities instead of log-probabilities", HEAD, HEAD.replace("log_softmax", "softmax")),
    ("raw logits", HEAD, f"return self.classifier_head({DROPPED})"),
    (
        "log-sigmoid instead of log-softmax",
        HEAD,
        f"return F.logsigmoid(self.classifier_head({DROPPED}))",
    ),
    ("softmax over the batch", HEAD, HEAD.replace("dim=-1", "dim=0")),
    ("first column", *pooled("hidden[:, 0]")),
    ("second column", *pooled("hidden[:, 1]")),
    ("column before the last", *pooled("hidden[:, -2]")),
    ("mean of all columns", *pooled("hidden.mean(dim=1)")),
    (
        "mean of the real tokens",
        *pooled("torch.stack([h[t != 3].mean(0) for h, t in zip(hidden, input_ids)])"),
    ),
    ("maximum over all columns", *pooled("hidden.max(dim=1).values")),
    (
        "last real token instead of the last column",
        *pooled("torch.stack([h[t != 3][-1] for h, t in zip(hidden, input_ids)])"),
    ),
    ("ReLU before the head", HEAD, HEAD.replace(DROPPED, f"F.relu({DROPPED})")),
    ("tanh before the head", HEAD, HEAD.replace(DROPPED, f"torch.tanh({DROPPED})")),
    (
        "ReLU after the head",
        HEAD,
        f"return F.log_softmax(self.classifier_head({DROPPED}).relu(), dim=-1)",
    ),
    ("no dropout", HEAD, HEAD.replace(DROPPED, "pooled.float()")),
    (
        "dropout after the head",
        HEAD,
        "return F.log_softmax(self.dropout(self.classifier_head(pooled.float())), dim=-1)",
    ),
    ("dropout twice", HEAD, HEAD.replace(DROPPED, f"self.dropout({DROPPED})")),
    (
        "dropout while evaluating",
        HEAD,
        HEAD.replace(DROPPED, "F.dropout(pooled.float(), self.dropout.p)"),
    ),
    (
        "dropout only while evaluating",
        HEAD,
        HEAD.replace(DROPPED, "F.dropout(pooled.float(), self.dropout.p, not self.training)"),
    ),
    ("dropout rate ignored", "nn.Dropout(config.hidden_dropout_prob)", "nn.Dropout(0.5)"),
    (
        "dropout without rescaling",
        HEAD,
        HEAD.replace(DROPPED, f"{DROPPED} * (0.7 if self.training else 1.0)"),
    ),
    ("frozen parameters trained", TRAINED, "pass"),
    ("model frozen while fine-tuning", TRAINED, "self.llama.requires_grad_(False)"),
    (
        "only a part of the model fine-tuned",
        TRAINED,
        f"{TRAINED}\n        self.llama.layers[0].requires_grad_(False)",
    ),
    ("no gradient for the model", POOLED, f"{POOLED}\n        pooled = pooled.detach()"),
    ("head frozen", LINEAR, f"{LINEAR}.requires_grad_(False)"),
)
COURSE_HEAD = "self.classifier_head = torch.nn.Linear(self.llama.config.dim, self.num_labels)"
COURSE_CLASSIFIER: tuple[Row, ...] = (
    ("first column", "hidden_states[:, -1, :]", "hidden_states[:, 0, :]"),
    (
        "raw logits",
        "logits = self.classifier_head(final_hidden)\n",
        "return self.classifier_head(final_hidden)\n",
    ),
    ("no dropout", "final_hidden = self.dropout(final_hidden)", "pass"),
    (
        "dropout while evaluating",
        "final_hidden = self.dropout(final_hidden)",
        "final_hidden = F.dropout(final_hidden, p=self.dropout.p)",
    ),
    (
        "frozen parameters trained",
        'if config.option == "pretrain":\n                param.requires_grad = False',
        'if config.option == "pretrain":\n                param.requires_grad = True',
    ),
    (
        "logits of the vocabulary instead of the hidden state",
        f"{COURSE_HEAD}\n\n    def forward(self, input_ids):\n"
        "        _, hidden_states = self.llama(input_ids)\n",
        COURSE_HEAD.replace("config.dim", "config.vocab_size")
        + "\n\n    def forward(self, input_ids):\n"
        "        hidden_states, _ = self.llama(input_ids)\n",
    ),
    (
        "logits of the vocabulary instead of the hidden state",
        f"{COURSE_HEAD}\n\n    def forward(self, input_ids):\n"
        "        _, hidden_states = self.llama(input_ids)\n",
        f"{COURSE_HEAD}\n\n    def forward(self, input_ids):\n"
        "        hidden_states, _ = self.llama(input_ids)\n",
    ),
)
# ---------------------------------------------------------------------------- loading, in ours
STRICT = """\
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            model = cls(config)
        load_strictly(model, parse_weights(checkpoint, path, config.tie_embeddings), path)
        model.tie_weights()  # loading gave each of the two names its own parameter
"""
TIE = "        model.tie_weights()  # loading gave each of the two names its own parameter\n"
TABLE = '    "wk": "compute_key",\n    "wv": "compute_value",\n'


def lenient(condition: str) -> str:
    """Load only the parameters for which a condition on `name` holds."""
    return f"""\
        model = cls(config)
        weights = parse_weights(checkpoint, path, config.tie_embeddings)
        kept = {{name: tensor for name, tensor in weights.items() if {condition}}}
        model.load_state_dict(kept, strict=False)
"""


OURS_LOADING: tuple[Row, ...] = (
    (
        "the Hub's names are not known",
        STRICT,
        lenient('any(name in stored for stored in checkpoint["model"])'),
    ),
    (
        "only the Hub's names are known",
        STRICT,
        lenient(
            'not any("compute_" in stored for stored in checkpoint["model"]) '
            'or ".attention." not in name'
        ),
    ),
    ("attention left random", STRICT, lenient('".attention." not in name')),
    ("feed-forward networks left random", STRICT, lenient('".feed_forward." not in name')),
    ("gains of the norms left at 1", STRICT, lenient('"norm" not in name')),
    (
        "embeddings left random",
        STRICT,
        lenient('name not in ("tok_embeddings.weight", "output.weight")'),
    ),
    ("the whole model left random", STRICT, lenient("False")),
    ("prefix _orig_mod. not removed", 'WRAPPER_PREFIXES.sub("", name)', "name"),
    ("embeddings not tied", TIE, ""),
    (
        "keys and values exchanged",
        TABLE,
        '    "wk": "compute_value",\n    "wv": "compute_key",\n',
    ),
    ("weights in half precision", "        return model.eval()\n", "        return model.half()\n"),
)
COURSE_LOADING: tuple[Row, ...] = (
    (
        "the whole model left random",
        "model.load_state_dict(weights, strict=False)",
        "model.load_state_dict(contents, strict=False)",
    ),
    ("embeddings not tied", "        self.tok_embeddings.weight = self.output.weight\n", ""),
)


def plants() -> Iterator[Plant]:
    yield from rows("ours", "generate", "llama.py", OURS_GENERATE)
    yield from rows("course", "generate", "llama.py", COURSE_GENERATE)
    yield from rows("ours", "AdamW", "optimizer.py", OURS_ADAMW)
    yield from rows("course", "AdamW", "optimizer.py", COURSE_ADAMW)
    yield from rows("ours", "zero-shot scores", "classifier.py", OURS_ZERO_SHOT)
    yield from rows("course", "zero-shot scores", "classifier.py", COURSE_ZERO_SHOT)
    yield from rows("ours", "embedding classifier", "classifier.py", OURS_CLASSIFIER)
    yield from rows("course", "embedding classifier", "classifier.py", COURSE_CLASSIFIER)
    yield from rows("ours", "loading", "base_llama.py", OURS_LOADING)
    yield from rows("course", "loading", "llama.py", COURSE_LOADING)


PLANTS = tuple(plants())
