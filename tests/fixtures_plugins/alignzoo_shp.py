import alignzoo


def shp(row):
    """Stanford Human Preferences: two comments on a post, labels = 1 where A has the higher score."""
    ratio = row.get("score_ratio")
    if isinstance(ratio, float) and ratio < 1.5:
        return None  # too close to call: left out and counted
    if row["labels"] not in (0, 1):
        raise ValueError(f"labels = {row['labels']}, not 0 or 1")
    better, worse = ("A", "B") if row["labels"] == 1 else ("B", "A")
    return {"prompt": row["history"], "chosen": row[f"human_ref_{better}"], "rejected": row[f"human_ref_{worse}"]}


@alignzoo.hookimpl
def alignzoo_formats():
    return [
        alignzoo.Format(
            name="shp",
            kind="pairs",
            columns=("history", "human_ref_A", "human_ref_B", "labels"),
            description="a post, two comments on it, and which of them has the higher score",
            make=shp,
            optional=("score_ratio",),
        )
    ]
