"""What a user's YAML file names: functions without annotations, as most are."""


def images(batch):
    return batch["image"]


def labels(batch):
    return batch["label"]


def logits(module, inputs):
    return module(inputs)
