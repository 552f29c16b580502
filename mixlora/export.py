"""python -m mixlora.export run=RUN_FOLDER to=FOLDER [merge=true]"""

from pathlib import Path

from omegaconf import DictConfig

from mixlora.config.cli import door
from mixlora.errors import ConfigError


@door("export")
def main(cfg: DictConfig) -> None:
    run, to = Path(str(cfg.run)), Path(str(cfg.to))
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"to={to} is not empty. Name a new folder")
    from mixlora import loading
    from mixlora.adapters import files
    from mixlora.adapters.attach import adapter_tensors

    loaded = loading.load(run)
    model, method, _ = loading.described(run)
    if cfg.merge:
        files.merge(loaded.model)
        loaded.model.config.use_cache = True
        loaded.model.save_pretrained(to)
        loaded.tokenizer.save_pretrained(to)
    else:
        if not files.is_plain_lora(loaded.model):
            raise ConfigError(
                f"method '{method.name}' has gates, which PEFT's LoRA format cannot hold. "
                f"Load it with mixlora.load('{run}'), or train a method without a gate"
            )
        files.save(to, adapter_tensors(loaded.model), loaded.model, method, model.path or model.name)
    print(f"Wrote {to}")


if __name__ == "__main__":
    main()
