//! Runs whose config is that of a task around a model.

use std::path::Path;

use x_transformers::{
    config::Config,
    train::{CaptionerConfig, ClassifierConfig, ImageClassifierConfig, ImageTransform},
};

use crate::failure::Result;

/// Description of what a run trained, and its models by their names.
pub type Task = (String, Vec<(&'static str, Config)>);

/// Returns the task of the run in a folder; `None` if its config is that of a model.
pub fn of(folder: &Path) -> Result<Option<Task>> {
    if let Some(config) = ImageClassifierConfig::read(folder)? {
        let lines = format!("{}{}", line("task", "classes of images"), line("classes", config.labels.join(", ")));
        let lines = lines + &images(&config.transform, config.flip) + "\n";
        return Ok(Some((lines, vec![("", Config::from_value(config.net)?)])));
    }
    if let Some(config) = CaptionerConfig::read(folder)? {
        let lines = line("task", "captions of images") + &images(&config.transform, config.flip);
        let models = [("encoder", config.encoder), ("decoder", config.decoder)];
        let models = models.into_iter().map(|(name, value)| Ok((name, Config::from_value(value)?)));
        return Ok(Some((lines, models.collect::<Result<_>>()?)));
    }
    if let Some(config) = ClassifierConfig::read(folder)? {
        let task = if config.labels.is_empty() { "numbers of texts" } else { "classes of texts" };
        let classes = match &config.labels[..] {
            [] => String::new(),
            labels => line("classes", labels.join(", ")),
        };
        return Ok(Some((format!("{}{classes}\n", line("task", task)), vec![("", Config::from_value(config.net)?)])));
    }
    Ok(None)
}

/// Describes the preparation of images.
fn images(transform: &ImageTransform, flip: bool) -> String {
    let ImageTransform { size, mean, std } = transform;
    let mirrored = if flip { ", half of them mirrored in training" } else { "" };
    line("images", format_args!("{size} x {size} pixels, mean {mean:?}, standard deviation {std:?}{mirrored}"))
}

fn line(name: &str, value: impl std::fmt::Display) -> String {
    format!("{name:<15}{value}\n")
}
