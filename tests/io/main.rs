//! Files of weights and of pretrained models.

#[path = "../common/pretrained.rs"]
mod reference;

mod export;
mod gguf;
mod peft;
mod pretrained;
mod pretrained_names;
mod quantised_files;
mod safetensors;
