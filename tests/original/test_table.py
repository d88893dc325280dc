"""Every flag of both older projects, by the names in their parsers: what it sets, or what is said of it."""

from pathlib import Path

import pytest

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.original.modes import MEANINGS
from cogvideox_factory.original.page import update
from cogvideox_factory.original.translate import SCRIPTS, Translation, find_script, translate
from tests.original.brought import config_of

# Names as the two parsers have them, typed from those, not from our table.
MINDSPORE_TRAINING = """
pretrained_model_name_or_path revision variant cache_dir transformer_config transformer_ckpt_path data_root dataset_file
video_column caption_column id_token height_buckets width_buckets frame_buckets vae_cache embeddings_cache random_flip
dataloader_num_workers pin_memory dynamic_shape bucket_config validation_prompt validation_images
validation_prompt_separator num_validation_videos validation_epochs validation_steps guidance_scale use_dynamic_cfg
enable_model_cpu_offload seed lora_rank lora_alpha mixed_precision output_dir height width video_reshape_mode fps
max_num_frames skip_frames_start skip_frames_end train_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing
fa_gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power enable_slicing
enable_tiling noised_image_dropout ignore_learned_positional_embeddings enable_sequence_parallelism
sequence_parallel_shards max_sequence_length optimizer use_8bit use_4bit use_torchao beta1 beta2 beta3 prodigy_decouple
prodigy_use_bias_correction prodigy_safeguard_warmup weight_decay epsilon max_grad_norm use_cpu_offload_optimizer
offload_gradients tracker_name push_to_hub hub_token hub_model_id logging_dir nccl_timeout report_to distributed
mindspore_mode jit_level amp_level zero_stage
"""
PYTORCH_TRAINING = """
pretrained_model_name_or_path revision variant cache_dir data_root dataset_file video_column caption_column id_token
height_buckets width_buckets frame_buckets load_tensors random_flip dataloader_num_workers pin_memory validation_prompt
validation_images validation_prompt_separator num_validation_videos validation_epochs validation_steps guidance_scale
use_dynamic_cfg enable_model_cpu_offload seed rank lora_alpha mixed_precision output_dir height width video_reshape_mode
fps max_num_frames skip_frames_start skip_frames_end train_batch_size num_train_epochs max_train_steps
checkpointing_steps checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing
learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power enable_slicing enable_tiling
noised_image_dropout ignore_learned_positional_embeddings optimizer use_8bit use_4bit use_torchao beta1 beta2 beta3
weight_decay epsilon max_grad_norm prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup
use_cpu_offload_optimizer offload_gradients tracker_name push_to_hub hub_token hub_model_id logging_dir allow_tf32
nccl_timeout report_to
"""
MINDSPORE_PREPARATION = """
distributed pretrained_model_name_or_path model_id data_root dataset_file caption_column video_column id_token
height_buckets width_buckets frame_buckets random_flip dataloader_num_workers video_reshape_mode save_image_latents
output_dir max_num_frames max_sequence_length target_fps vae_cache embeddings_cache save_latents save_embeddings
use_slicing use_tiling batch_size num_decode_threads dtype seed num_artifact_workers
"""
PYTORCH_PREPARATION = """
model_id data_root output_dir dataset_file caption_column video_column id_token random_flip height_buckets width_buckets
frame_buckets video_reshape_mode save_image_latents save_latents_and_embeddings max_num_frames max_sequence_length
target_fps use_slicing use_tiling batch_size num_decode_threads num_artifact_workers dataloader_num_workers pin_memory
dtype seed
"""
INFERENCE = """
seed distributed mindspore_mode jit_level zero_stage mixed_precision enable_sequence_parallelism
sequence_parallel_shards pretrained_model_name_or_path revision variant prompt image_path transformer_ckpt_path
lora_ckpt_path height width frame max_sequence_length npy_output_path video_output_path
"""

T2V, I2V, LORA = "text-to-video-sft", "image-to-video-sft", "text-to-video-lora"
ALONE, OF_8 = 1, 8
MODEL = "--pretrained_model_name_or_path model"
BASE = {
    "train": f"{MODEL} --data_root clips --max_train_steps 1000 --optimizer adamw",
    "prepare": f"{MODEL} --data_root clips --output_dir out",
    "generate": MODEL,
}

# What is typed, in which script, in how many processes, and what the settings are then.
SETS = [
    (T2V, ALONE, "--pretrained_model_name_or_path other", {"model.path": "other"}),
    (T2V, ALONE, "--revision main", {"model.revision": "main"}),
    (T2V, ALONE, "--transformer_config 10b.yaml", {"model.transformer_config": "10b.yaml"}),
    (T2V, ALONE, "--transformer_config 10b.yaml --transformer_ckpt_path w",
     {"model.transformer": "w", "model.transformer_config": "10b.yaml"}),
    (T2V, ALONE, "--data_root a", {"data.root": "a", "data.captions": "text", "data.videos": "video"}),
    (T2V, ALONE, "--video_column videos.txt", {"data.videos": "videos.txt"}),
    (T2V, ALONE, "--caption_column prompts.txt", {"data.captions": "prompts.txt"}),
    (T2V, ALONE, "--dataset_file /d/a.csv --video_column v --caption_column c",
     {"data.table": "/d/a.csv", "data.video_column": "v", "data.caption_column": "c", "data.captions": None}),
    (T2V, ALONE, "--id_token BW_STYLE", {"data.trigger_word": "BW_STYLE"}),
    (T2V, ALONE, "", {"data.height": 480, "data.width": 720, "data.num_frames": 49, "data.buckets": None}),
    (T2V, ALONE, "--height_buckets 768", {"data.height": 768}),
    (T2V, ALONE, "--width_buckets 1360", {"data.width": 1360}),
    (T2V, ALONE, "--frame_buckets 77 --max_num_frames 77", {"data.num_frames": 77}),
    (T2V, ALONE, "--height_buckets 256 480 --width_buckets 720", {"data.buckets": "auto", "data.height": 480}),
    (T2V, ALONE, "--bucket_config b.yaml", {"data.buckets": "b.yaml", "data.short_clips": "reject"}),
    (T2V, ALONE, "--random_flip 0.5", {"data.flip_probability": 0.5}),
    (T2V, ALONE, "--dataloader_num_workers 7", {"train.num_workers": 7}),
    (T2V, ALONE, "", {"train.num_workers": 1}),
    (T2V, ALONE, "--validation_prompt one:::two --validation_steps 50",
     {"validation.prompts": ["one", "two"], "validation.every": 50}),
    (T2V, ALONE, "--validation_prompt one|two --validation_prompt_separator | --validation_steps 5",
     {"validation.prompts": ["one", "two"]}),
    (I2V, ALONE, "--validation_prompt a:::b --validation_images x.png:::y.png --validation_steps 5",
     {"validation.images": ["x.png", "y.png"]}),
    (T2V, ALONE, "--validation_prompt a --validation_steps 5 --guidance_scale 4.5 --use_dynamic_cfg",
     {"sampling.guidance_scale": 4.5, "sampling.dynamic_guidance": True}),
    (T2V, ALONE, "--seed 7", {"run.seed": 7}),
    (LORA, ALONE, "--lora_rank 128", {"lora.rank": 128}),
    (LORA, ALONE, "--rank 128", {"lora.rank": 128}),
    (LORA, ALONE, "--lora_alpha 32", {"lora.alpha": 32.0}),
    (LORA, ALONE, "", {"task": "t2v", "train.method": "lora", "lora.rank": 64, "lora.alpha": 64.0}),
    (I2V, ALONE, "", {"task": "i2v", "train.method": "full", "train.image_dropout": 0.05}),
    (T2V, ALONE, "--mixed_precision bf16", {"run.dtype": "bfloat16"}),
    (T2V, ALONE, "--mixed_precision no", {"run.dtype": "float32"}),
    (T2V, ALONE, "", {"run.dtype": "float32"}),
    (T2V, ALONE, "--mixed_precision fp16", {"run.dtype": "float16"}),
    (T2V, ALONE, "--mixed_precision fp16 --amp_level O0", {"run.dtype": "float32"}),
    (T2V, ALONE, "--mixed_precision fp16 --amp_level o3", {"run.dtype": "float16"}),
    (T2V, ALONE, "--output_dir runs/a", {"train.dir": "runs/a"}),
    (T2V, ALONE, "", {"train.dir": "cogvideox-sft"}),
    (T2V, ALONE, "--video_reshape_mode center", {"data.crop": "center"}),
    (T2V, ALONE, "--video_reshape_mode random", {"data.crop": "random"}),
    (T2V, ALONE, "", {"data.crop": "stretch", "data.fps_policy": "stretch", "data.short_clips": "repeat_last"}),
    (T2V, ALONE, "--train_batch_size 2", {"train.batch_size": 2}),
    (T2V, OF_8, "--train_batch_size 2", {"train.batch_size": 16}),
    (T2V, OF_8, "--train_batch_size 1 --enable_sequence_parallelism True --sequence_parallel_shards 4",
     {"train.batch_size": 2, "parallel.sequence": 4}),
    (T2V, ALONE, "", {"train.batch_size": 4}),
    (T2V, ALONE, "--max_train_steps 70", {"train.steps": 70}),
    (T2V, ALONE, "--checkpointing_steps 20", {"train.save_every": 20, "train.keep_checkpoints": 50}),
    (T2V, ALONE, "--checkpoints_total_limit 2", {"train.keep_checkpoints": 2}),
    (T2V, ALONE, "--resume_from_checkpoint latest", {"train.resume": "auto"}),
    (T2V, ALONE, "--resume_from_checkpoint elsewhere/checkpoint-70 --output_dir o",
     {"train.resume": "o/checkpoint-000070"}),
    (T2V, ALONE, "--gradient_accumulation_steps 4", {"train.gradient_accumulation": 4}),
    (T2V, ALONE, "", {"train.checkpointing": "none"}),
    (T2V, ALONE, "--gradient_checkpointing", {"train.checkpointing": "save_attention"}),
    (T2V, ALONE, "--gradient_checkpointing --fa_gradient_checkpointing=False",
     {"train.checkpointing": "save_attention"}),
    (T2V, ALONE, "--gradient_checkpointing --fa_gradient_checkpointing=True", {"train.checkpointing": "full"}),
    (T2V, ALONE, "--learning_rate 3e-5", {"train.learning_rate": 3e-5}),
    (T2V, OF_8, "--learning_rate 1e-5 --scale_lr --train_batch_size 1 --gradient_accumulation_steps 2",
     {"train.learning_rate": 16e-5}),
    (T2V, OF_8, "--learning_rate 1e-5 --scale_lr --train_batch_size 1 --enable_sequence_parallelism True "
     "--sequence_parallel_shards 8", {"train.learning_rate": 1e-5}),
    (T2V, ALONE, "--learning_rate= --train_batch_size= --height_buckets= --fa_gradient_checkpointing= --output_dir=",
     {"train.learning_rate": 1e-4, "train.batch_size": 4, "data.height": 480, "train.dir": "cogvideox-sft"}),
    (T2V, ALONE, "--lr_scheduler cosine --lr_warmup_steps 80", {"train.schedule": "cosine", "train.warmup_steps": 80}),
    (T2V, ALONE, "--lr_scheduler linear", {"train.schedule": "linear", "train.warmup_steps": 500}),
    (T2V, ALONE, "", {"train.schedule": "constant", "train.warmup_steps": 0}),
    (T2V, ALONE, "--lr_scheduler constant_with_warmup --lr_warmup_steps 9",
     {"train.schedule": "constant", "train.warmup_steps": 9}),
    (T2V, ALONE, "--lr_scheduler cosine_with_restarts --lr_num_cycles 3", {"train.num_cycles": 3}),
    (T2V, ALONE, "--lr_scheduler polynomial --lr_power 2", {"train.power": 2.0}),
    (T2V, ALONE, "--enable_tiling", {"data.vae_tiling": True}),
    (I2V, ALONE, "--noised_image_dropout 0.2", {"train.image_dropout": 0.2}),
    (T2V, OF_8, "--zero_stage 3", {"parallel.zero": 3}),
    (T2V, ALONE, "--max_sequence_length=224", {"text.max_sequence_length": 224}),
    (T2V, ALONE, "--optimizer AdamW_bf16", {"train.optimizer": "adamw"}),
    (T2V, ALONE, "--optimizer adam", {"train.optimizer": "adam"}),
    (T2V, ALONE, "--optimizer adamw --use_8bit", {"train.optimizer": "adamw8bit"}),
    (T2V, ALONE, "--optimizer prodigy --beta3 0.99", {"train.optimizer": "prodigy", "train.beta3": 0.99}),
    (T2V, ALONE, "--optimizer came", {"train.optimizer": "came"}),
    (T2V, ALONE, "--use_cpu_offload_optimizer", {"train.optimizer_offload": True}),
    (T2V, ALONE, "--allow_tf32", {"run.tf32": True}),
    (T2V, ALONE, "--beta1 0.8", {"train.beta1": 0.8}),
    (T2V, ALONE, "--beta2 0.99", {"train.beta2": 0.99}),
    (T2V, ALONE, "--weight_decay 1e-3", {"train.weight_decay": 1e-3}),
    (T2V, ALONE, "--epsilon 1e-6", {"train.epsilon": 1e-6}),
    (T2V, ALONE, "", {"train.weight_decay": 1e-4, "train.epsilon": 1e-8, "train.beta1": 0.9, "train.beta2": 0.95}),
    (T2V, ALONE, "--max_grad_norm 0.1", {"train.max_grad_norm": 0.1}),
    (T2V, ALONE, "--nccl_timeout 3600", {"parallel.timeout_seconds": 3600.0}),
    (T2V, ALONE, "", {"train.caption_dropout": 0.0, "train.tracker": "none", "train.compile": "none"}),
    (T2V, ALONE, "--mindspore_mode 1 --jit_level O1", {"train.compile": "none", "run.deterministic": True}),
    (T2V, ALONE, "--mindspore_mode 0", {"train.compile": "none"}),
    (T2V, ALONE, "--mindspore_mode 0 --jit_level O1", {"train.compile": "default", "run.deterministic": True}),
    (T2V, ALONE, "--mindspore_mode 0 --jit_level O2", {"train.compile": "max_autotune", "run.deterministic": False}),
    (T2V, ALONE, "--allow_tf32", {"run.tf32": True}),
    (T2V, ALONE, "--report_to wandb,tensorboard --tracker_name mine",
     {"train.tracker": "wandb", "train.tracker_project": "mine"}),
    (LORA, ALONE, "--report_to trackio", {"train.tracker": "trackio", "train.tracker_project": "cogvideox-lora"}),
    ("prepare-dataset", ALONE, "--pretrained_model_name_or_path other", {"model.path": "other"}),
    ("prepare-dataset", ALONE, "--model_id other", {"model.path": "other"}),
    ("prepare-dataset", ALONE, "--data_root a", {"data.root": "a", "data.captions": "caption", "data.videos": "video"}),
    ("prepare-dataset", ALONE, "--dataset_file /a.csv", {"data.table": "/a.csv", "data.caption_column": "caption"}),
    ("prepare-dataset", ALONE, "--caption_column p.txt --video_column v.txt",
     {"data.captions": "p.txt", "data.videos": "v.txt"}),
    ("prepare-dataset", ALONE, "--id_token W", {"data.trigger_word": "W"}),
    ("prepare-dataset", ALONE, "--height_buckets 768 --width_buckets 1360 --frame_buckets 77 --max_num_frames 77",
     {"data.height": 768, "data.width": 1360, "data.num_frames": 77}),
    ("prepare-dataset", ALONE, "--video_reshape_mode center", {"data.crop": "center"}),
    ("prepare-dataset", ALONE, "--save_image_latents", {"task": "i2v"}),
    ("prepare-dataset", ALONE, "--output_dir o", {"cache.dir": "o", "task": "t2v"}),
    ("prepare-dataset", ALONE, "", {"text.max_sequence_length": 226, "run.dtype": "float32", "run.seed": 42}),
    ("prepare-dataset", ALONE, "--max_sequence_length 224", {"text.max_sequence_length": 224}),
    ("prepare-dataset", ALONE, "--use_tiling", {"data.vae_tiling": True}),
    ("prepare-dataset", ALONE, "--dtype bf16", {"run.dtype": "bfloat16"}),
    ("prepare-dataset", ALONE, "--seed 3", {"run.seed": 3}),
    ("infer", ALONE, "", {"generate.height": 768, "generate.width": 1360, "generate.num_frames": 77,
                          "text.max_sequence_length": 224, "run.dtype": "bfloat16", "task": "t2v"}),
    ("infer", OF_8, "--enable_sequence_parallelism True --sequence_parallel_shards 8 --zero_stage 3",
     {"parallel.sequence": 8, "parallel.zero": 3}),
    ("infer", OF_8, "--zero_stage 2", {"parallel.zero": 0}),
    ("infer", ALONE, "--seed 3", {"run.seed": 3}),
    ("infer", ALONE, "--mixed_precision no", {"run.dtype": "float32"}),
    ("infer", ALONE, "--pretrained_model_name_or_path m", {"model.path": "m"}),
    ("infer", ALONE, "--revision r", {"model.revision": "r"}),
    ("infer", ALONE, "--prompt x", {"generate.prompt": ["x"]}),
    ("infer", ALONE, "--image_path a.png", {"generate.image": ["a.png"], "task": "i2v"}),
    ("infer", ALONE, "--transformer_ckpt_path t", {"model.transformer": "t"}),
    ("infer", ALONE, "--lora_ckpt_path l", {"generate.lora": ["l"]}),
    ("infer", ALONE, "--height 480 --width 720 --frame 49",
     {"generate.height": 480, "generate.width": 720, "generate.num_frames": 49}),
    ("infer", ALONE, "--max_sequence_length 226", {"text.max_sequence_length": 226}),
    ("infer", ALONE, "--video_output_path o/a.mp4", {"generate.out": "o/a.mp4", "generate.format": "mp4"}),
    ("infer", ALONE, "--npy_output_path o/npy", {"generate.out": "o/npy", "generate.format": "npy"}),
    ("infer", ALONE, "--npy_output_path o/npy --video_output_path a.mp4", {"generate.out": "a.mp4"}),
]  # fmt: skip

# What is typed, and what is said of it.
SAYS = [
    (T2V, "--cache_dir d", "HF_HOME"),
    (T2V, "--pin_memory", "wherever there is a card"),
    (T2V, "--dynamic_shape", "need not be declared"),
    (T2V, "--embeddings_cache", "captions are encoded once"),
    (T2V, "--validation_images a.png", "there is no validation_prompt"),
    (T2V, "--validation_epochs 1", "there is no validation_prompt"),
    (T2V, "--validation_steps 1", "there is no validation_prompt"),
    (T2V, "--guidance_scale 5", "there is no validation_prompt"),
    (T2V, "--use_dynamic_cfg", "there is no validation_prompt"),
    (T2V, "--validation_prompt a --validation_steps 5 --validation_images a.png", "belongs to image-to-video"),
    (T2V, "--validation_prompt a --validation_steps 5 --validation_epochs 1", "validation_steps decides"),
    (T2V, "--num_validation_videos 2", "one sample video a prompt"),
    (T2V, "--enable_model_cpu_offload", "text encoder is gone"),
    (T2V, "--lora_rank 8", "belongs to a LoRA"),
    (T2V, "--lora_alpha 8", "belongs to a LoRA"),
    (T2V, "--height 64", "size that is trained"),
    (T2V, "--width 64", "size that is trained"),
    (T2V, "--fps 16", "data.fps_policy"),
    (T2V, "--max_num_frames 30", "frame_buckets decides"),
    (T2V, "--skip_frames_start 0", "--skip_frames_start: no effect"),
    (T2V, "--skip_frames_start 2", "with theirs neither"),
    (T2V, "--skip_frames_end 2", "with theirs neither"),
    (T2V, "--num_train_epochs 2", "max_train_steps decides"),
    (T2V, "--fa_gradient_checkpointing True", "nothing is computed again"),
    (T2V, "--lr_warmup_steps 5", "constant has none"),
    (T2V, "--lr_num_cycles 2", "cosine_with_restarts"),
    (T2V, "--lr_power 2", "polynomial"),
    (T2V, "--enable_slicing", "one at a time"),
    (T2V, "--noised_image_dropout 0.1", "belongs to image-to-video"),
    (T2V, "--enable_sequence_parallelism True --sequence_parallel_shards 8", "this is one process"),
    (T2V, "--sequence_parallel_shards 8", "is False"),
    (T2V, "--zero_stage 2", "this is one process"),
    (T2V, "--use_torchao", "no library"),
    (T2V, "--beta3 0.9", "prodigy and came"),
    (T2V, "--prodigy_decouple", "authors advise"),
    (T2V, "--prodigy_use_bias_correction", "authors advise"),
    (T2V, "--prodigy_safeguard_warmup", "authors advise"),
    (T2V, "--optimizer came --epsilon 1e-6", "came has its own"),
    (T2V, "--offload_gradients", "moves them as well"),
    (T2V, "--tracker_name x", "belongs to report_to wandb"),
    (T2V, "--hub_token secret", "nothing is pushed"),
    (T2V, "--hub_model_id x", "nothing is pushed"),
    (T2V, "--logging_dir x", "tensorboard/ lies in output_dir"),
    (T2V, "--distributed", "the launcher decides"),
    (T2V, "--mindspore_mode 0", "eager: train.compile none"),
    (T2V, "--mindspore_mode 0 --jit_level O1", "each block, once a shape"),
    (T2V, "--jit_level O2", "graph mode"),
    (T2V, "--mixed_precision bf16 --amp_level O2", "fp16 only"),
    (T2V, "--bucket_config b.yaml --train_batch_size 2", "how many clips of each shape"),
    (T2V, "--bucket_config b.yaml --height_buckets 64", "the bucket file has the shapes"),
    (T2V, "--height_buckets 64 128", "makes up to 8 shapes"),
    (T2V, "--scale_lr", "4 clips a step = 0.0004"),
    (T2V, "", "all 2 checkpoints are kept"),
    (T2V, "", "resample keeps its speed (--data.fps-policy)"),
    (T2V, "", "center crops instead (--data.crop)"),
    (T2V, "", "keeps guidance calibrated (--train.caption-dropout)"),
    ("prepare-dataset", "--distributed --pin_memory", "wherever there is a card"),
    ("prepare-dataset", "--vae_cache", "both kept"),
    ("prepare-dataset", "--embeddings_cache", "both kept"),
    ("prepare-dataset", "", "both kept"),
    ("prepare-dataset", "--dataloader_num_workers 3", "as the encoder needs"),
    ("prepare-dataset", "--target_fps 16", "none are made"),
    ("prepare-dataset", "--use_slicing", "one at a time"),
    ("prepare-dataset", "--batch_size 4", "eight at a time"),
    ("prepare-dataset", "--num_decode_threads 4", "with theirs neither"),
    ("prepare-dataset", "--num_artifact_workers 2", "as the encoder needs"),
    ("infer", "--distributed", "the launcher decides"),
    ("infer", "--mindspore_mode 0 --jit_level O1", "--jit_level: no effect, making videos is eager"),
    ("infer", "--mindspore_mode 0", "--mindspore_mode: no effect, making videos is eager"),
    ("infer", "--zero_stage 3", "this is one process"),
    ("infer", "--zero_stage 2", "only training has"),
    ("infer", "--enable_sequence_parallelism True", "this is one process"),
    ("infer", "--sequence_parallel_shards 8", "is False"),
    ("infer", "--npy_output_path d", "one file there, of all frames"),
    ("infer", "--npy_output_path d --video_output_path a.mp4", "video_output_path has the frames"),
    ("infer", "", "A panda"),
]

# What is typed, and the error, with its way out.
REFUSES = [
    (T2V, "--variant fp16", "run.dtype converts while loading"),
    (T2V, "--ignore_learned_positional_embeddings", "480 x 720"),
    (T2V, "--use_4bit", "--use_8bit is"),
    (T2V, "--optimizer prodigy --use_8bit", "there for adamw"),
    (T2V, "--push_to_hub", "cogvideox export RUN --push-to-hub NAME"),
    (T2V, "--report_to comet_ml", "metrics.jsonl are written in any case"),
    (T2V, "--report_to wandb,trackio", "give one of"),
    (T2V, "--validation_prompt x", "give --validation_steps"),
    (T2V, "--bucket_config b.yaml --max_train_steps= --num_train_epochs 2", "give --max_train_steps N"),
    (T2V, "--bucket_config b.yaml --validation_prompt x --validation_epochs 1", "give --validation_steps N"),
    (T2V, "--mindspore_mode 2", "give 0 (graph) or 1 (PyNative)"),
    ("infer", "--mindspore_mode 2", "give 0 (graph) or 1 (PyNative)"),
    (T2V, "--learning_rats 1", "did you mean 'learning_rate'"),
    (T2V, "--learning-rate 1", "did you mean 'learning_rate'"),
    (T2V, "--rnk 8", "--original text-to-video-sft --help"),
    (T2V, "--lr_scheduler cosin", "did you mean 'cosine'"),
    (T2V, "--optimizer lion", "give one of adam"),
    (T2V, "--train_batch_size 1.5", "not a whole number"),
    (T2V, "--learning_rate fast", "not a number"),
    (T2V, "--learning_rate", "needs a value"),
    (T2V, "--height_buckets", "needs a value"),
    (T2V, "--vae_cache True", "takes no value"),
    (T2V, "--enable_sequence_parallelism maybe", "give True or False"),
    (T2V, "--id_token a red fox", "quote it"),
    (T2V, "--vae_cache", "holds no cache"),
    (T2V, "--load_tensors", "--original prepare-dataset"),
    ("prepare-dataset", "--random_flip 0.5", "train from clips with --random_flip"),
    ("infer", "--variant fp16", "converts while loading"),
]


def bring(script: str, words: str, *, num_processes: int = 1, rank: int = 0) -> Translation:
    found, origin = find_script(script, SCRIPTS[script.rpartition(":")[2]].command)
    typed = [*BASE[found.command].split(), *words.split()]
    return translate(found, typed, origin=origin, num_processes=num_processes, rank=rank)


@pytest.mark.parametrize(("script", "num_processes", "words", "settings"), SETS, ids=lambda value: str(value)[:60])
def test_a_flag_sets(script, num_processes, words, settings):
    config = config_of(bring(script, words, num_processes=num_processes))
    for name, value in settings.items():
        section, _, field = name.partition(".")
        found = getattr(config, section)
        found = getattr(found, field) if field else found
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, name


@pytest.mark.parametrize(("script", "words", "says"), SAYS, ids=lambda value: str(value)[:60])
def test_a_flag_without_effect_is_told(script, words, says):
    assert says in "\n".join(bring(script, words).said)


@pytest.mark.parametrize(("script", "words", "says"), REFUSES, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_is_refused_with_a_way_out(script, words, says):
    with pytest.raises(FactoryError) as caught:
        bring(script, words)
    assert says in str(caught.value)


def names_of(script: str) -> set[str]:
    return {name for flag in SCRIPTS[script].flags for name in (flag.name, *flag.also)}


def test_every_flag_of_both_projects_is_in_the_table():
    assert len(MINDSPORE_TRAINING.split()) == 91
    assert len(PYTORCH_TRAINING.split()) == 78
    assert names_of(T2V) == {*MINDSPORE_TRAINING.split(), *PYTORCH_TRAINING.split()}
    assert names_of("prepare-dataset") == {*MINDSPORE_PREPARATION.split(), *PYTORCH_PREPARATION.split()}
    assert names_of("infer") == {*INFERENCE.split(), "transformer_config"}


def test_every_setting_that_the_table_names_is_there():
    names = {name for script in SCRIPTS.values() for flag in script.flags for name in flag.setting.split(", ") if name}
    for name in names - {"task", "prepare.shard"}:
        section, _, field = name.partition(".")
        assert field in type(getattr(Config(), section)).model_fields, name


@pytest.mark.parametrize("script", [T2V, "prepare-dataset", "infer"])
def test_every_flag_is_tried_above(script):
    command = SCRIPTS[script].command
    texts = [BASE[command]]
    texts += [row[2] for row in SETS if SCRIPTS[row[0]].command == command]
    texts += [row[1] for row in SAYS + REFUSES if SCRIPTS[row[0]].command == command]
    tried = {word[2:].partition("=")[0] for text in texts for word in text.split() if word.startswith("--")}
    through = {"save_latents", "save_embeddings", "save_latents_and_embeddings", "transformer_config"}
    assert names_of(script) - through <= tried


def test_the_pytorch_projects_defaults_are_taken_where_they_are_asked_for():
    config = config_of(bring(f"pytorch:{T2V}", ""))
    assert (config.data.buckets, config.data.height, config.data.width) == ("auto", 1536, 1536)
    assert config.train.num_workers == 0
    assert config.data.short_clips == "reject"
    script, origin = find_script("pytorch:prepare-dataset", "prepare")
    words = ["--data_root", "a", "--output_dir", "b", "--save_latents_and_embeddings"]
    found = translate(script, words, origin=origin)
    assert found.settings["model.path"] == "THUDM/CogVideoX-2b"
    assert not any("kept" in line for line in found.said)


def test_older_names_of_the_cache_flags_are_known():
    assert not any("kept" in line for line in bring("prepare-dataset", "--save_latents --save_embeddings").said)


def test_numbers_that_make_no_sense_are_left_to_the_settings_laws():
    for words in ("--checkpointing_steps 0", "--train_batch_size 0", "--checkpoints_total_limit 0"):
        with pytest.raises(FactoryError, match="greater than 0"):
            config_of(bring(T2V, words))


def test_each_process_prepares_its_part():
    found = bring("prepare-dataset", "--distributed", num_processes=8, rank=2)
    assert found.settings["prepare.shard"] == "3/8"
    assert "prepare.shard" not in bring("prepare-dataset", "--distributed").settings


def test_settings_of_ours_among_theirs_count():
    found = bring(T2V, "--data.fps-policy resample --train.steps=7 --max_train_steps 9")
    assert found.ours == ["--data.fps-policy", "resample", "--train.steps=7"]
    assert "data.fps_policy" not in found.settings
    assert "train.steps" not in found.settings
    assert not any("keeps its speed" in line for line in found.said)


def test_every_word_of_mindspores_modes_is_explained():
    explained = {(row.flag, row.value) for row in MEANINGS}
    values = {"mindspore_mode": "01", "jit_level": ("O0", "O1", "O2"), "amp_level": ("O0", "O1", "O2", "O3")}
    assert explained == {(flag, value) for flag in values for value in values[flag]}


def test_a_script_of_another_command_or_no_script_is_told():
    with pytest.raises(FactoryError, match="did you mean 'text-to-video-sft'"):
        find_script("text-to-video-stf", "train")
    with pytest.raises(FactoryError, match="cogvideox generate --original infer"):
        find_script("infer", "train")
    with pytest.raises(FactoryError, match="pytorch:"):
        find_script("jax:infer", "generate")


def test_epochs_are_counted_in_the_list(tmp_path):
    (tmp_path / "videos").mkdir()
    for index in range(10):
        (tmp_path / "videos" / f"{index}.mp4").touch()
    (tmp_path / "prompts.txt").write_text("".join(f"clip {index}\n" for index in range(10)))
    (tmp_path / "videos.txt").write_text("".join(f"videos/{index}.mp4\n" for index in range(10)))
    script, origin = find_script(T2V, "train")
    words = (
        f"{MODEL} --data_root {tmp_path} --caption_column prompts.txt --video_column videos.txt --train_batch_size 4"
    )
    words += " --num_train_epochs 3 --validation_prompt x --validation_epochs 1"
    found = translate(script, words.split(), origin=origin)
    assert found.settings["train.steps"] == 9, "ten clips, four a step, three times"
    assert found.settings["validation.every"] == 3
    assert "3 epoch(s) of 10 clips, 4 a step: 9 steps" in found.said


def test_a_folder_that_the_older_trainers_prepared_is_led_to_the_import(tmp_path):
    (tmp_path / "video_latents").mkdir()
    script, origin = find_script(T2V, "train")
    with pytest.raises(FactoryError, match="import-prepared"):
        translate(script, f"{MODEL} --data_root {tmp_path} --vae_cache".split(), origin=origin)


def test_the_page_has_the_tables_as_the_code_has_them():
    page = Path(__file__).parents[2] / "docs" / "original.md"
    text = page.read_text(encoding="utf-8")
    assert update(text) == text, "run: python -m cogvideox_factory.original docs/original.md"
    for flag in (*MINDSPORE_TRAINING.split(), *PYTORCH_PREPARATION.split(), *INFERENCE.split()):
        assert flag in text


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--mindspore_mode 0 --jit_level O1", {"mindspore.mode": 0, "mindspore.jit_level": "O1"}),
        ("--mindspore_mode 1 --jit_level O1", {"mindspore.mode": 1}),
        ("--mixed_precision fp16 --amp_level O3", {"mindspore.mode": 1, "mindspore.amp_level": "O3"}),
        ("--mixed_precision bf16 --amp_level O3", {"mindspore.mode": 1, "run.dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("engine", ["--engine mindspore", "--engine=mindspore"])
def test_modes_are_handed_through_to_the_engine_that_knows_them(words, settings, engine, old_clips):
    lists = "--caption_column prompt.txt --video_column videos.txt --max_train_steps 2"
    given = f"--pretrained_model_name_or_path M --data_root {old_clips} {lists}"
    found = translate(SCRIPTS[T2V], f"{given} {words} {engine}".split(), origin="mindspore").settings
    assert {name: found[name] for name in settings} == settings
    assert {name for name in found if name.startswith("mindspore.")} == {n for n in settings if n[0] == "m"}
    assert "train.compile" not in found
