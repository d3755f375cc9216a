//! Names of a family's tensors, whatever program trained and saved the file.
//!
//! A state dict may lie below other names: those of the object that it was part of (`state_dict.`, `model.`), of
//! wrappers around the model (`module.`, `_orig_mod.`, `0.auto_model.`), or those of the model inside one with a head
//! (`bert.`). The place of one tensor that every model of the family has tells where; all other tensors are named from
//! there.

use std::collections::BTreeMap;

use super::TensorFile;
use crate::{
    Error, ParamMap, Result, Tensor,
    collect::CollectVec,
    ordered::{OrderedMap, try_ordered},
    sort::sort,
};

/// Names of a family's tensors.
pub(crate) struct Layout {
    /// Begins the names of the model inside one with a head.
    pub base: &'static str,
    /// If `true`, the family's own names begin with it here; if not, they are those of the model without a head.
    pub with_base: bool,
    /// Ends of the names of tensors below `base`, of which one is in every file.
    pub anchors: &'static [&'static str],
    /// Beginnings of names of heads, which are never below `base`.
    pub heads: &'static [&'static str],
    /// Beginnings of names below `base` that stand for others.
    pub aliases: &'static [(&'static str, &'static str)],
}

/// Modules that wrappers put into the middle of names: `torch.compile`, FSDP and activation checkpoints.
const INFIXES: [&str; 4] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module."];

/// Prefixes that a state dict may lie below, each any number of times and in any order. If a file has the weights in
/// several places, those below only these prefixes are meant.
const WRAPPERS: [&str; 14] = [
    "ema_model.",
    "state_dict.",
    "model_state_dict.",
    "model.",
    "module.",
    "net.",
    "network.",
    "0.auto_model.",
    "0.model.",
    "auto_model.",
    "backbone.",
    "base_model.",
    "encoder.",
    "transformer.",
];

/// Names of tensors in a file, by the family's own names.
#[derive(Debug, Default)]
pub(crate) struct Renamed {
    old: OrderedMap<String, String>,
    /// Where the model lies, and how its own names begin in place of that.
    place: [String; 2],
    /// Where heads lie, and how their names begin.
    outer: String,
    heads: &'static [&'static str],
}

impl Renamed {
    /// Returns the name that a tensor has, or would have, in the file.
    pub fn of_file(&self, own: &str) -> String {
        let [place, base] = &self.place;
        // Nothing has such a name otherwise.
        let plain = own.strip_suffix(ELSEWHERE).unwrap_or(own);
        match self.old.get(own) {
            Some(old) => old.clone(),
            None if plain != own => plain.to_string(),
            None if self.heads.iter().any(|head| own.starts_with(head)) => format!("{}{own}", self.outer),
            None => own.strip_prefix(base.as_str()).map_or_else(|| own.to_string(), |inner| format!("{place}{inner}")),
        }
    }
}

/// Ends the name of a tensor whose own one belongs to another tensor now.
pub(super) const ELSEWHERE: &str = " (elsewhere)";

impl Layout {
    /// Gives the tensors of a file the family's own names. A file without any of the anchors stays as it is.
    ///
    /// Errors: several places that may be meant.
    pub fn apply(&self, file: &mut TensorFile) -> Result<Renamed> {
        let names: Vec<String> = file.all_names().map(str::to_string).collect_vec();
        let Some(place) = self.place(file, &names)? else { return Ok(Renamed::default()) };
        // Heads lie beside the model, or in it where the model itself has no name.
        let outer = place.strip_suffix(self.base).unwrap_or(&place);
        let (mut new, mut others): (Vec<(String, &String)>, Vec<&String>) = Default::default();
        for name in &names {
            let plain = without_infixes(name);
            let own = match (plain.strip_prefix(&place), plain.strip_prefix(outer)) {
                (Some(head), _) if self.is_head(head) => head.to_string(),
                (Some(inner), _) => self.own(inner),
                (None, Some(beside)) => beside.to_string(),
                (None, None) => {
                    others.push(name);
                    continue;
                }
            };
            new.push((own, name));
        }
        // Of several that have one name the one that has it already is meant, else the first; the last here counts.
        let has_it = |(own, name): &(String, &String)| own == *name;
        let mut renamed: Vec<(String, &String)> = others.into_iter().map(|name| (name.clone(), name)).collect_vec();
        renamed.extend(new.iter().rev().filter(|pair| !has_it(pair)).cloned());
        renamed.extend(new.into_iter().filter(has_it));
        let new = renamed.into_iter().map(|(own, name)| (own, name.clone())).collect();
        file.rename(&new);
        let base = if self.with_base { self.base } else { "" };
        let outer = outer.to_string();
        Ok(Renamed { old: new, place: [place, base.to_string()], outer, heads: self.heads })
    }

    /// Where the model lies, as a beginning of names without infixes.
    fn place(&self, file: &TensorFile, names: &[String]) -> Result<Option<String>> {
        for anchor in self.anchors {
            let place = |name: &String| {
                let name = without_infixes(name);
                let place = name.strip_suffix(anchor)?;
                (place.is_empty() || place.ends_with('.')).then(|| place.to_string())
            };
            let mut places: Vec<String> = names.iter().filter_map(place).collect_vec();
            sort(&mut places);
            places.dedup();
            if places.is_empty() {
                continue;
            }
            let own = ["", self.base].into_iter().find(|&own| places.iter().any(|place| place == own));
            let wrapped: Vec<&String> = places.iter().filter(|place| is_wrapped(place, self.base)).collect_vec();
            return match (own, &wrapped[..], places.len()) {
                (Some(own), _, _) => Ok(Some(own.to_string())),
                (None, [one], _) => Ok(Some(one.to_string())),
                (None, [], 1) => Ok(places.into_iter().next()),
                _ => Err(several(file, &places)),
            };
        }
        Ok(None)
    }

    fn is_head(&self, name: &str) -> bool {
        self.heads.iter().any(|head| name.starts_with(head))
    }

    /// The family's own name of a tensor below `base`.
    fn own(&self, inner: &str) -> String {
        let alias = self.aliases.iter().find_map(|(from, to)| Some(format!("{to}{}", inner.strip_prefix(from)?)));
        let inner = norm_of_old(&alias.unwrap_or_else(|| inner.to_string()));
        if self.with_base { format!("{}{inner}", self.base) } else { inner }
    }
}

/// If `true`, a place is below known wrappers and `base` alone.
fn is_wrapped(place: &str, base: &str) -> bool {
    let mut rest = place;
    let known = || WRAPPERS.into_iter().chain([base]).filter(|wrapper| !wrapper.is_empty());
    while let Some(inner) = known().find_map(|wrapper| rest.strip_prefix(wrapper)) {
        rest = inner;
    }
    rest.is_empty()
}

impl TensorFile {
    /// Reads a state dict for these parameters: all tensors, like [`TensorFile::tensors`], or, if the parameters lie
    /// below prefixes of wrappers and trainers (`model.`, `state_dict.`, `module.`, `_orig_mod.` and the like), all
    /// tensors there under their own names, without tensors elsewhere, such as the moments of an optimizer.
    ///
    /// Errors: those of [`TensorFile::tensors`]; several places with such parameters.
    pub fn state_dict(&self, params: &ParamMap) -> Result<BTreeMap<String, Tensor>> {
        let Some((first, _)) = params.iter().next() else { return self.tensors() };
        let plain: OrderedMap<String, &str> = self.all_names().map(|name| (without_infixes(name), name)).collect();
        let place = |name: &String| {
            let place = name.strip_suffix(first)?;
            (place.is_empty() || place.ends_with('.') && is_wrapped(place, "")).then(|| place.to_string())
        };
        let mut places: Vec<String> = plain.keys().iter().filter_map(place).collect_vec();
        sort(&mut places);
        let place = match &places[..] {
            [] => return self.tensors(),
            [only] => only,
            [own, ..] if own.is_empty() => own,
            _ => return Err(several(self, &places)),
        };
        if place.is_empty() && plain.iter().all(|(plain, name)| plain == name) {
            return self.tensors();
        }
        let below = plain.iter().filter_map(|(plain, name)| Some((plain.strip_prefix(place)?, name)));
        // An object of another kind is not a tensor of a state dict.
        let below = below.filter(|(_, name)| self.info(name).is_some() || self.is_unreadable(name));
        try_ordered(below.map(|(own, name)| Ok((own.to_string(), self.tensor(name)?))))
    }
}

fn several(file: &TensorFile, places: &[String]) -> Error {
    let list: Vec<String> = places.iter().map(|place| format!("`{place}`")).collect_vec();
    Error::file(
        file.path(),
        format_args!("has the weights of a model under {}; save only one of them", list.join(" and ")),
    )
}

fn without_infixes(name: &str) -> String {
    INFIXES.iter().fold(name.to_string(), |name, infix| {
        // Only whole parts of a name: behind a dot, or in front.
        if !name.contains(infix) {
            return name;
        }
        let name = name.strip_prefix(infix).map(str::to_string).unwrap_or(name);
        name.replace(&format!(".{infix}"), ".")
    })
}

/// A norm's name as PyTorch has it, where TensorFlow's `gamma` and `beta` were kept.
fn norm_of_old(name: &str) -> String {
    let renamed = [("gamma", "weight"), ("beta", "bias")].into_iter().find_map(|(old, new)| {
        let place = name.strip_suffix(old)?.strip_suffix('.')?;
        let module = place.rsplit('.').next()?.to_ascii_lowercase();
        module.contains("norm").then(|| format!("{place}.{new}"))
    });
    renamed.unwrap_or_else(|| name.to_string())
}
