import alignzoo


def brevity(prompts, completions, *, words: int = 50, **columns):
    """1 for an empty answer, falling to 0 at `words` words."""
    return [max(0.0, 1 - len(completion.split()) / words) for completion in completions]


@alignzoo.hookimpl
def alignzoo_rewards():
    return [brevity]
