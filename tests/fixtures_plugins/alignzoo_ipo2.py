from dataclasses import dataclass

import alignzoo


@dataclass(frozen=True)
class Settings:
    tau: float = alignzoo.setting(0.1, "regularisation; the target margin is 1/(2 tau)", gt=0)


class IPO2(alignzoo.Loss):
    name, data, needs_reference = "ipo2", "pairs", True
    Settings = Settings

    def __call__(self, batch: alignzoo.Pairs) -> alignzoo.LossOutput:
        margin = batch.chosen.log_ratio("mean") - batch.rejected.log_ratio("mean")  # (B,)
        return alignzoo.LossOutput((margin - 1 / (2 * self.settings.tau)) ** 2, metrics={"margin": margin.detach()})


@alignzoo.hookimpl
def alignzoo_losses():
    return [IPO2]
