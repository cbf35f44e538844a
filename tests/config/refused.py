"""Command lines that are refused, and what their one line says; tests/config/test_errors.py runs them."""

from tests.helpers.runs import tiny_command

NOBODYS = "nobody/has-put-this-on-the-hub"

# The command line, then what its one line must contain: the key with the value given, and the remedy.
REFUSED = [
    # names that are not there
    ("foo=1", "foo is unknown", "--cfg job"),
    ("+foo.bar=1", "foo is unknown", "--cfg job"),
    ("stepps=3", "stepps is unknown", "did you mean steps?"),
    ("polcy.dim_model=3", "polcy.dim_model", "did you mean policy.dim_model?"),
    ("policy.n_actions_steps=3", "policy.n_actions_steps", "did you mean policy.n_action_steps?"),
    ("policy.dim_feedforwrd=64", "policy.dim_feedforwrd", "did you mean +policy.dim_feedforward?"),
    ("env.visualisation_width=64", "env.visualisation_width", "did you mean +env.visualization_width?"),
    ("policy.dropout=0.2", "policy.dropout", "+policy.dropout=VALUE"),
    ("scheduler.type=cosine", "scheduler.type", "+scheduler.type=VALUE"),
    ("policy.batch_size=3", "policy.batch_size", "did you mean batch_size?"),
    ("optimizer_lr=1e-4", "optimizer_lr", "did you mean policy.optimizer_lr?"),
    ("~foo", "~foo", "there is no foo to remove"),
    # names of old
    ("policy.hidden_dim=256", "policy.hidden_dim", "did you mean policy.dim_model?"),
    ("env_eval_freq=5", "env_eval_freq", "did you mean eval_freq?"),
    ("training.steps=4", "training.steps", "did you mean steps?"),
    ("lr=1e-4", "lr", "did you mean policy.optimizer_lr?"),
    ("device=cuda", "device", "did you mean policy.device?"),
    ("eval.seed=4", "eval.seed", "did you mean eval.start_seed?"),
    ("resume=true", "resume=true", "did you mean mode=resume?"),
    ("config_path=x", "config_path", "did you mean resume.path?"),
    ("policy.path=x", "policy.path", "checkpoint (mode=eval)", "resume.path (mode=resume)"),
    # names that are common elsewhere
    *((f"{name}=4", f"{name} is unknown", "did you mean steps?") for name in ("max_steps", "num_train_steps")),
    *((f"{name}=4", f"{name} is unknown", "did you mean steps?") for name in ("train_steps", "train.steps")),
    ("epochs=4", "epochs is unknown", "did you mean steps (one epoch"),
    *(
        (f"{name}=1e-4", f"{name} is unknown", "did you mean policy.optimizer_lr?")
        for name in ("learning_rate", "train.lr", "training.lr")
    ),
    ("lr_backbone=1e-4", "lr_backbone is unknown", "did you mean policy.optimizer_lr_backbone?"),
    *(
        (f"{name}=1", f"{name} is unknown", "did you mean +optimizer.grad_clip_norm?")
        for name in ("grad_clip", "grad_clip_norm", "gradient_clip")
    ),
    ("num_workers=4", "num_workers is unknown", "did you mean eval.workers or demos.workers?"),
    ("save_interval=4", "save_interval is unknown", "did you mean save_freq?"),
    ("log_interval=4", "log_interval is unknown", "did you mean log_freq?"),
    ("ckpt_path=x", "ckpt_path is unknown", "checkpoint (mode=eval) or resume.path (mode=resume)"),
    *(
        (f"{name}=3", f"{name} is unknown", f"did you mean {meant}?")
        for name, meant in (
            *(("max_epochs", "steps (one epoch is the number of frames / batch_size)"), ("run_name", "job_name")),
            *(("weight_decay", "+policy.optimizer_weight_decay"), ("bf16", "train.precision"), ("bs", "batch_size")),
            *(("num_envs", "eval.batch_size"), ("warmup_steps", "+scheduler.num_warmup_steps")),
        )
    ),
    ("wandb_project=x", "wandb_project is unknown", "did you mean wandb.project?"),
    # what there is no more
    ("mode=dagger", "mode=dagger was removed"),
    ("dagger.labels=[x]", "dagger.* was removed", "leave it out"),
    # groups
    ("policy=act_smal", "policy=act_smal", "did you mean policy=act_small?"),
    ("mode=train", "mode=train", "full, resume, status, test"),
    ("polic=act", "polic", "did you mean policy?"),
    ("+policy=act_small", "+policy", "leave the + out"),
    ("policy=3", "policy=3 does not exist", "there is act, act_"),
    *((choice, choice, "give policy= one of act, act_s") for choice in ("policy=[3]", "policy={a:1}", "policy=[act]")),
    *((choice, choice, "leave it out") for choice in ("~dataset", "~policy", "~policy=act")),
    ("experiment=[3]", "experiment=[3]", "keypoints_best"),
    ("dataset=[]", "dataset=[]", "pusht_keypoints"),
    ("hydra/launcher=slurm", "hydra/launcher=slurm", "submitit_slurm"),
    # values of another type
    ("steps=abc", "steps=abc", "give a whole number"),
    ("steps=1.5", "steps=1.5", "give a whole number"),
    ("batch_size=null", "batch_size=null", "must have a value"),
    ("overwrite=perhaps", "overwrite=perhaps", "give true or false"),
    ("wandb.enable=2", "wandb.enable=2", "give true or false"),
    ("wandb={enable:-1}", "wandb.enable=-1", "give true or false"),
    ("policy.chunk_size=abc", "policy.chunk_size=abc", "not a number"),
    ("policy.optimizer_lr=null", "policy.optimizer_lr=None", "not a number"),
    ("steps", "'steps'", "give KEY=VALUE"),
    ("policy.n_action_steps=[", "policy.n_action_steps=[", "give KEY=VALUE"),
    ("seed=1,2", "seed=1,2", "add -m"),
    ("+policy.chunk_size=8", "policy.chunk_size", "leave the + out"),
    # sizes
    *((f"{key}=0", f"{key}=0", "give 1 or more") for key in ("steps", "batch_size", "eval.n_episodes")),
    *((f"{key}=-1", f"{key}=-1", "give 0 or more") for key in ("seed", "eval_freq", "save_freq", "eval.n_videos")),
    *((f"checkpoints.{key}=-1", f"checkpoints.{key}=-1", "give 0 or more") for key in ("keep_last", "keep_every")),
    *((f"train.{key}=-1", f"train.{key}=-1", "give 0 or more") for key in ("max_nonfinite", "max_rollbacks")),
    ("ema.min_decay=0.9 ema.max_decay=0.5", "ema.min_decay=0.9 exceeds ema.max_decay=0.5"),
    ("ema.decay=0.9 ema.max_decay=0.99", "ema.decay=0.9 is constant", "ema.max_decay=0.99", "leave one of them out"),
    ("ema.decay=1.5", "ema.decay=1.5 is too large", "give a number in [0, 1]"),
    ("ema.power=0", "ema.power=0.0 is too small", "give a number above 0"),
    ("ema.enable=true print_lerobot_command=true dataset=pusht_keypoints dataset.root=x", "ema.enable=true has no"),
    ("eval.workers=-1", "eval.workers=-1", "give 0 or more"),
    ("policy.chunk_size=0", "policy.chunk_size=0", "give a number in [1, 100000]"),
    ("policy.n_action_steps=-4", "policy.n_action_steps=-4", "give a number in [1, 100000]"),
    ("policy.optimizer_lr=-1", "policy.optimizer_lr=-1", "give 0 or more"),
    ("env.episode_length=0", "env.episode_length=0", "give 1 or more"),
    ("dataset=demos demos.n_episodes=0", "demos.n_episodes=0", "give 1 or more"),
    ("dataset=demos demos.n_episodes=2001", "demos.n_episodes=2001", "give 1 to 2000"),
    ("policy.n_action_steps=101", "policy.n_action_steps=101", "policy.chunk_size=100", "give policy.n_action_steps="),
    ("dataset.eval_split=1", "dataset.eval_split=1", "give a number in [0, 1)"),
    ("eval_steps=5", "eval_steps=5", "dataset.eval_split=0.1"),
    ("+scheduler.peak_lr=0", "scheduler.peak_lr=0", "give a number above 0"),
    ("+scheduler.peak_lr=-1e-4", "scheduler.peak_lr=-0.0001", "give a number above 0"),
    ("+scheduler.peak_lr=high", "scheduler.peak_lr=high", "give a number above 0"),
    ("+scheduler.decay_lr=-1", "scheduler.decay_lr=-1", "give 0 or more"),
    ("output_dir=", "output_dir=", "leave it out"),
    # options that would do nothing
    ("resume.path=x", "resume.path=x", "mode=resume"),
    ("checkpoint=x", "checkpoint=x", "mode=eval"),
    ("sweep=seeds", "sweep=seeds is for a sweep", "give -m"),
    ("hydra/sweeper=optuna", "hydra/sweeper=optuna is for a sweep", "give -m"),
    ("sweep=optuna_learning_rates hydra/sweeper=basic", "sweep=optuna_learning_rates is for a sweep", "give -m"),
    ("sweep.max_tries=2", "sweep.max_tries=2 is for a sweep", "give -m"),
    ("sweep.resume=x", "sweep.resume=x resumes a sweep", "give -m"),
    ("-m sweep.resume=x", "sweep.resume=x holds no sweep", "give a folder such as multirun/DATE/TIME"),
    ("checkpoints.keep_every=5", "checkpoints.keep_every=5", "checkpoints.keep_last=3"),
    ("keep_last=5", "keep_last", "did you mean checkpoints.keep_last?"),
    ("checkpoint.keep_last=5", "checkpoint.keep_last", "did you mean checkpoints.keep_last?"),
    ("dataset=demos dataset.root=/data", "dataset.root=/data", "dataset=pusht"),
    *(
        (f"demos.{given}", f"demos.{given} is for mode=demos, not for mode=full: give mode=demos too", "leave it out")
        for given in ("initial_states=x", "start_seed=2000000", "action_noise=1", "workers=2", "repo_id=me/x")
    ),
    *(
        (f"demos.{given}", f"demos.{given} is for mode=demos, not for mode=full: give mode=demos too", "leave it out")
        for given in ("coverage=0.98", "speed=9", "smoothness=2", "replan=1", "seed=3")
    ),
    *(
        (f"demos.initial_states=x {mode}", "demos.initial_states=x is for mode=demos, not for mode=", "leave it out")
        for mode in ("mode=test dataset=demos", "mode=resume", "mode=eval checkpoint=x")
    ),
    ("demos.push_to_hub=true", "demos.push_to_hub=True", "mode=demos", "leave it out"),
    ("++demos.speed=8", "demos.speed=8", "mode=demos"),
    ("demos={n_episodes:3,speed:8} dataset=demos", "demos.speed=8", "mode=demos"),
    ("demos.n_episodes=30", "demos.n_episodes=30", "mode=demos or dataset=demos"),
    ("mode=demos demos.mirror=true", "train.mirror=0.5 is for training"),
    ("mode=eval checkpoint=x demos.n_episodes=30", "demos.n_episodes=30 is for training", "and mode=demos, not for"),
    ("+policy.input_features={}", "policy.input_features={}", "leave it out"),
    ("+policy.n_obs_steps=2", "policy.n_obs_steps=2", "give policy.n_obs_steps=1"),
    ("policy.push_to_hub=true policy.repo_id=me/x save_checkpoint=false", "save_checkpoint=false", "push_to_hub=true"),
    # choices
    ("policy.type=diffusion", "policy.type=diffusion", "give policy.type=act"),
    ("wandb.mode=on", "wandb.mode=on", "online, offline or disabled"),
    ("dataset.repo_id=null", "dataset.repo_id=null", "give one text"),
    ("+dataset.episodes=[0,0]", "dataset.episodes=[0, 0]", "[0,1,2]"),
    ("+dataset.episodes=[]", "dataset.episodes=[]", "leave it out"),
    ("dataset.observations=[]", "dataset.observations=[]", "leave it out"),
    ("dataset.observations=[1]", "dataset.observations=[1]", "[observation.image,observation.state]"),
    ("dataset.observations=observation.image", "dataset.observations=observation.image", "is no list of names"),
    ("dataset.allow_change=maybe", "dataset.allow_change=maybe", "true or false"),
    ("rename_map=x", "rename_map=x", "{observation.images.top: observation.image}"),
    ("rename_map={a:1}", "rename_map={'a': 1}", "leave it out"),
    ("mode=eval checkpoint=x rename_map={a:b}", "rename_map.a=b is for training", "leave it out"),
    ("dataset.rename={a:b}", "dataset.rename", "did you mean rename_map?"),
    ("dataset=demos rename_map={a:b}", "rename_map={'a': 'b'} means nothing for the built-in", "dataset=pusht"),
    ("dataset=demos dataset.observations=[a]", "dataset.observations=['a'] means nothing for the built-in"),
    # checkpoints
    ("mode=eval", "mode=eval", "give checkpoint="),
    ("mode=eval checkpoint=nowhere", "checkpoint=nowhere", "checkpoints/last"),
    ("mode=eval checkpoint=.", "checkpoint=.", "no config.json", "checkpoints/STEP"),
    ("mode=resume", "nothing to resume in outputs/act_pusht/train", "mode=full", "resume.path="),
    ("mode=resume resume.path=nowhere", "resume.path=nowhere", "checkpoints/last"),
    ("+policy.pretrained_path=nowhere", "policy.pretrained_path=nowhere", "checkpoints/last"),
    # mode=status
    ("mode=status", "mode=status needs a folder", "give dir=DIR"),
    ("mode=status dir=nowhere", "dir=nowhere holds neither a sweep", "give a folder such as multirun/DATE/TIME"),
    ("mode=status dir=.", "dir=. holds neither a sweep", "outputs/act_pusht/train"),
    ("mode=status dir=. status.every=-1", "status.every=-1", "give 0 or more"),
    ("mode=status dir=. status.every=soon", "status.every=soon", "give a number"),
    ("-m mode=status dir=.", "mode=status looks at one sweep or run", "leave -m out"),
    *(
        (f"mode=status dir=. {given}", f"{given} is for ", "not for mode=status: leave it out")
        for given in ("steps=3", "policy=act_small", "output_dir=x", "print_lerobot_command=True")
    ),
    ("dir=x", "dir=x is for mode=status", "leave it out"),
    ("mode=eval checkpoint=x status.every=3", "status.every=3 is for mode=status", "leave it out"),
    # the new options of a run that cannot be stopped for good
    ("resume.auto=maybe", "resume.auto=maybe", "give true or false"),
    ("resume.auto=2", "resume.auto=2", "give true or false"),
    ("resume.auto=null", "resume.auto=null", "must have a value"),
    *(
        (f"{mode} resume.auto=true", "resume.auto=True is for mode=test and mode=full", "leave it out")
        for mode in ("mode=resume", "mode=eval checkpoint=x", "mode=demos")
    ),
    ("resume.path=x resume.auto=true", "resume.path=x", "mode=resume"),
    ("resume=auto", "resume=auto", "did you mean mode=resume?"),
    *(
        (f"train.{key}={value}", f"train.{key}={value}", remedy)
        for key in ("max_nonfinite", "max_rollbacks")
        for value, remedy in (("many", "whole number"), ("1.5", "whole number"), ("null", "must have a value"))
    ),
    *(
        (f"{mode} {given}", f"{given} is for training (", f"not for {mode.split()[0]}: leave it out")
        for mode in ("mode=eval checkpoint=x", "mode=demos")
        for given in ("train.max_nonfinite=3", "train.max_rollbacks=3", "checkpoints.keep_last=3")
    ),
    # options that the mode does not use
    *(
        (f"mode=eval checkpoint=x {given}", f"{given} is for training (", "not for mode=eval: leave it out")
        for given in (
            *("steps=5", "batch_size=4", "log_freq=1", "save_checkpoint=True", "eval.background=False"),
            *("train.mirror=0.5", "dataset.root=/data", "policy.optimizer_lr=0.1", "policy.push_to_hub=True"),
        )
    ),
    ("mode=eval checkpoint=x +optimizer.grad_clip_norm=1", "optimizer.grad_clip_norm=1 is for training (", "mode=eval"),
    ("mode=eval checkpoint=x seed=3", "seed=3 is for training (", "mode=eval has eval.start_seed="),
    *(
        (f"mode=demos {given}", f"{given} is for training (", "not for mode=demos: leave it out")
        for given in ("policy.dim_model=64", "eval.n_episodes=3", "seed=3", "wandb.enable=False", "steps=5")
    ),
    ("mode=demos policy.push_to_hub=true", "policy.push_to_hub=True is for training (", "demos.push_to_hub="),
    ("mode=demos checkpoint=x", "checkpoint=x is for mode=eval, not for mode=demos", "leave it out"),
    ("mode=resume +policy.pretrained_path=x", "policy.pretrained_path=x is for mode=test", "leave it out"),
    *(
        (f"mode=demos {given}", f"{given} is for training (", "not for mode=demos: leave it out")
        for given in ("policy=act_small", "dataset=demos", "logging=wandb", "job_name=x")
    ),
    *(
        (f"mode=eval checkpoint=x {given}", f"{given.strip('+')} is for training (", "not for mode=eval: leave it out")
        for given in ("+policy.dropout=0.3", "+policy.license=mit")
    ),
    ("mode=demos +env.visualization_width=64", "env.visualization_width=64 is for training (", "not for mode=demos"),
    # what + and ++ would add to our own sections
    ("+eval.n_episode=500", "eval.n_episode is unknown", "did you mean eval.n_episodes?"),
    ("++train.precison=bf16", "train.precison is unknown", "did you mean train.precision?"),
    ("+demos={speeed:3}", "demos.speeed is unknown", "did you mean demos.speed?"),
    ("eval={n_episode:3}", "eval.n_episode is unknown", "did you mean eval.n_episodes?"),
    ("mode=eval checkpoint=x ++eval.n_episode=5", "eval.n_episode is unknown", "did you mean eval.n_episodes?"),
    ("mode=demos +demos.spead=5", "demos.spead is unknown", "did you mean demos.speed?"),
    ("mode=status dir=. +status.evry=5", "status.evry is unknown", "did you mean status.every?"),
    ("+lr=1e-4", "lr is unknown", "did you mean policy.optimizer_lr?"),
    ("optimizer={grad_clip_norm:1}", "optimizer.grad_clip_norm is not in conf/", "+optimizer.grad_clip_norm=VALUE"),
    ("scheduler={type:cosine}", "scheduler.type is not in conf/", "+scheduler.type=VALUE"),
    # what is for a sweep, and Hydra's options that ours replace
    ("cluster=slurm seed=3", "cluster=slurm is for a sweep", "give -m too, as in `pusht-act -m cluster=slurm seed=3`"),
    *(
        (given, f"{given} is for a sweep", f"`pusht-act -m {given}`")
        for given in ("hydra/launcher=joblib", "hydra.sweep.dir=x", "hydra.sweeper.max_batch_size=3")
    ),
    ("hydra.run.dir=x", "hydra.run.dir=x has no use here", "give output_dir=x"),
    ("-m hydra.job.name=x seed=1,2", "hydra.job.name=x has no use here", "give job_name=x"),
    # options with dashes, as LeRobot has them
    ("--policy.chunk_size=50", "--policy.chunk_size=50: options have no dashes here", "give policy.chunk_size=50"),
    ("--policy.dropout 0.2", "--policy.dropout: options have no dashes here", "give +policy.dropout=0.2"),
    ("--steps 5 --batch_size 3", "--steps: options have no dashes here", "give steps=5"),
    ("--env_eval_freq=5", "--env_eval_freq=5: options have no dashes here", "give eval_freq=5"),
    ("--resume", "--resume: options have no dashes here", "give mode=resume"),
    ("--learning_rate=1e-4", "options have no dashes here", "give policy.optimizer_lr=1e-4"),
    ("--policy.path=x", "--policy.path=x: did you mean checkpoint (mode=eval)", "no dashes"),
    ("--policy.x=1", "--policy.x=1: options have no dashes here", "+policy.x=VALUE reaches LeRobot's other fields"),
    # an argument that Hydra cannot read is printed as it should have been given
    ("output_dir=a=b", "'output_dir=a=b' cannot be read", """give 'output_dir="a=b"'"""),
    ("wandb.notes=a(b", "cannot be read", """give 'wandb.notes="a(b"'"""),
    ("wandb.notes=a,b", "wandb.notes=a,b gives several values: add -m", """give 'wandb.notes="a,b"' for one text"""),
    ("dataset=lerobot/pusht", "dataset=lerobot/pusht does not exist", "pusht or dataset.repo_id=lerobot/pusht?"),
    ("dataset=me/other", "dataset=me/other does not exist", "did you mean dataset.repo_id=me/other?"),
    ("mode=demos checkpoints.background=false", "checkpoints.background=False is for training", "leave it out"),
    ("checkpoints.background=perhaps", "checkpoints.background=perhaps", "give true or false"),
    ("checkpoints.background=3", "checkpoints.background=3", "give true or false"),
    ("checkpoint.background=false", "checkpoint.background=false", "did you mean checkpoints.background?"),
    ("train=3", "train=3", "give one of its keys"),
    ("train.max_nan=3", "train.max_nan", "did you mean train.max_nonfinite?"),
    ("train.profile=true steps=5", "steps=5", "train.profile=true", "give 25 or more"),
    # numbers that are none
    *(
        (f"{key}={value}", f"{key.strip('+')}={value}", "give 0 or more")
        for key in ("policy.optimizer_lr", "policy.kl_weight", "+optimizer.grad_clip_norm")
        for value in ("nan", "inf", "-inf")
    ),
    ("+scheduler.peak_lr=nan", "scheduler.peak_lr=nan", "give a number above 0"),
    ("+scheduler.peak_lr=inf", "scheduler.peak_lr=inf", "give a number above 0"),
    ("dataset.eval_split=nan", "dataset.eval_split=nan", "[0, 1)"),
    ("mode=demos demos.coverage=nan", "demos.coverage=nan", "give a number in [0.95, 1)"),
    ("steps=inf", "steps=inf", "give a whole number"),
    ("batch_size=true", "batch_size=true", "give a whole number"),
    ("policy.chunk_size=3.5", "policy.chunk_size=3.5 is not a whole number", "give a number in [1, 100000]"),
    ("policy.dim_model=1e3", "policy.dim_model=1000.0 is not a whole number", "give a number in [1, 100000]"),
    # types and sizes that only LeRobot or torch would object to
    ("policy.device=[cpu]", "policy.device=['cpu']", "give one text or null"),
    ("+policy.vision_backbone=null", "policy.vision_backbone=null", "give one text"),
    ("+policy.use_vae=3", "policy.use_vae=3", "give true or false"),
    ("+policy.temporal_ensemble_coeff=nan", "policy.temporal_ensemble_coeff=nan is not a finite number"),
    ("policy.chunk_size=100000000000", "policy.chunk_size=100000000000 is too large", "give at most 2147483647"),
    ("policy.chunk_size=1000000000", "policy.chunk_size=1000000000 is too large", "give a number in [1, 100000]"),
    ("seed=1000000000000000000000", "seed=1000000000000000000000 is too large", "give at most 2147483647"),
    *(
        (f"+scheduler.num_warmup_steps={value}", f"scheduler.num_warmup_steps={said}", "give 0 or more")
        for value, said in (("null", "None is not a number"), ("-1", "-1 is too small"))
    ),
    ("+dataset.episodes=3", "dataset.episodes=3", "give a list or null"),
    ("--experimental-rerun=x", "--experimental-rerun would run any code", "give the overrides"),
    ("--exp x", "--exp would run any code", "give the overrides"),
    ("-m hydra/sweeper=optuna seed=interval(1,nan)", "seed=interval(1,nan)", "give finite numbers"),
    ("-m hydra/sweeper=optuna seed=interval(1,inf)", "seed=interval(1,inf)", "give finite numbers"),
    ("-m hydra/sweeper=optuna seed=range(1,1e12,0.5)", "seed=range(1,1e12,0.5)", "at most 1,000,000 values"),
    ("-m seed=1,2 policy.foo=1", "policy.foo is not in conf/"),
    ("wandb.entity=[1]", "wandb.entity=[1]", "give one text"),
    ("mode=eval checkpoint=[x]", "checkpoint=[x]", "give one text"),
    (f"mode=eval checkpoint={NOBODYS}", f"checkpoint={NOBODYS}", "give a path"),
    # after a run of TINY; these need LeRobot to be judged
    *((" ".join(tiny_command(*row[0].split(" "))), *row[1:]) for row in [
    ("+policy.dropuot=0.2", "policy.dropuot", "did you mean policy.dropout?"),
    ("+policy.dropout=abc", "policy.dropout=abc", "give a number"),
    ("+policy.dropout=2", "policy.dropout=2", "give a number in [0, 1)"),
    ("policy.dim_model=33", "policy.dim_model=33", "policy.n_heads=4", "give policy.dim_model=32"),
    ("+policy.feedforward_activation=tanh", "policy.feedforward_activation=tanh", "relu, gelu, glu"),
    ("+policy.vision_backbone=resnet999", "policy.vision_backbone=resnet999", "resnet18"),
    ("+policy.vision_backbone=vit", "policy.vision_backbone=vit", "ResNet"),
    ("policy.pretrained_backbone_weights=x", "policy.pretrained_backbone_weights=x", "or null"),
    ("+policy.temporal_ensemble_coeff=0.01", "policy.n_action_steps=8", "must be 1"),
    ("+policy.normalization_mapping.STATE=X", "policy.normalization_mapping", "NormalizationMode"),
    ("+policy.use_peft=true", "policy.use_peft=True", "leave it false"),
    ("+policy.pretrained_revision=x", "policy.pretrained_revision=x", "leave it out"),
    ("+env.foo=1", "env.foo", "PushtEnv has task, fps, ", "more"),
    ("env.type=aloha", "env.type=aloha", "give env.type=pusht"),
    ("env.task=Other", "env.task=Other", "give env.task=PushT-v0"),
    ("env.obs_type=state", "env.obs_type=state", "pixels_agent_pos"),
    ("+env.observation_width=96", "env.observation_width=96", "leave it out"),
    ("+env.render_mode=human", "env.render_mode=human", "leave it out"),
    ("+env.features={}", "env.features={}", "leave it out"),
    ("+dataset.streaming=true", "dataset.streaming=True is not supported", "leave it out"),
    ("+dataset.image_transforms.enable=true", "dataset.image_transforms", "is not supported", "leave it out"),
    ("+dataset.episodes=[0,99]", "dataset.episodes=[99]", "it has 0 to 3"),
    ("dataset.eval_split=0.9", "dataset.eval_split=0.9", "lower it"),
    ("+optimizer.lr=1", "optimizer.lr=1", "give policy.optimizer_lr="),
    ("+optimizer.foo=1", "optimizer.foo", "grad_clip_norm"),
    ("+optimizer.type=sgd", "optimizer.type=sgd", "give adamw"),
    ("+optimizer.betas=[2,3]", "optimizer.betas=[2.0, 3.0]", "give two numbers"),
    ("+optimizer.betas=3", "optimizer.betas=3", "give a list"),
    ("+scheduler.type=cosine", "scheduler.type=cosine", "cosine_decay_with_warmup"),
    ("+scheduler.type=cosine_decay_with_warmup", "scheduler.num_warmup_steps", "+scheduler.peak_lr=VALUE"),
    (f"dataset=pusht_keypoints dataset.repo_id={NOBODYS}", f"dataset.repo_id={NOBODYS}", "dataset=demos"),
    ("dataset=pusht_keypoints dataset.root=/nowhere", "dataset.root=/nowhere", "dataset.root=PATH"),
    ("output_dir=/proc/run", "output_dir=/proc/run", "where you may write"),
    ]),
]  # fmt: skip
