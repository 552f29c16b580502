"""python -m mixlora.export run=RUN_FOLDER to=FOLDER [merge=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora import signals
from mixlora.config.cli import door
from mixlora.config.doors import Export, run_folder
from mixlora.config.schema import Quantization
from mixlora.config.typed import typed
from mixlora.errors import ConfigError


@door("export", Export)
def main(cfg: DictConfig) -> None:
    options = typed(Export, cfg)
    run, to = run_folder(options.run), Path(options.to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"to={to} is {'not empty' if to.is_dir() else 'a file'}. Name a new folder")
    with signals.raised():  # what is half written goes
        exported(options, run, to)


def exported(options: Export, run: Path, to: Path) -> None:
    from transformers import GenerationConfig

    from mixlora import loading
    from mixlora.adapters import files
    from mixlora.adapters.attach import adapter_tensors
    from mixlora.evaluation.generation import by_rules, own_ends
    from mixlora.models.base import use_cache
    from mixlora.records import whole_folder

    model, method, _ = loading.looked_up(run, options.model)
    if method.gate is not None:
        raise ConfigError(
            f"method '{method.name}' has gates, which weigh the experts for each token anew: no single weight, and no "
            f"LoRA of PEFT, equals that. Load it with mixlora.load('{run}'), or train a method without a gate"
        )
    if options.merge and model.quantization is not Quantization.none:
        raise ConfigError(
            f"the base of {run} is {model.quantization.value}, and what is merged would be rounded once more. Keep the "
            f"adapter (merge=false, or mixlora.load('{run}')), or train with model.quantization=none"
        )
    loaded = loading.load(run, now=options.model)
    if not options.merge and not files.loads_in_peft(loaded.model):
        raise ConfigError(
            f"beside experts in one tensor PEFT takes feed-forward linears for the experts', and would load a part of "
            f"this LoRA. merge=true writes a plain model, and mixlora.load('{run}') gives the model with its adapter"
        )
    if options.merge:
        files.merge(loaded.model)
        use_cache(loaded.model, True)
        ends = {*own_ends(loaded.model, loaded.tokenizer), *loading.formatter(run, loaded.tokenizer).end_ids}
        rules = loaded.model.generation_config
        rules.eos_token_id = sorted(ends)
        with whole_folder(to, last="config.json") as partial:
            # transformers writes no rules that it would warn of, such as a temperature without do_sample.
            with by_rules(loaded.model, GenerationConfig()):
                loaded.model.save_pretrained(partial)
            rules.to_json_file(partial / "generation_config.json")
            loaded.tokenizer.save_pretrained(partial)
    else:
        files.save(to, adapter_tensors(loaded.model), loaded.model, method, model)
    print(f"Wrote {to}")


if __name__ == "__main__":
    main()
