//! Blocks of parameters that are used together, which ranks may divide.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use super::Param;
use crate::Result;

/// Parameters of a layer. Clones share them.
#[derive(Clone)]
pub(crate) struct Block(Arc<Cell>);

struct Cell {
    place: String,
    params: Vec<Param>,
    may_be_skipped: bool,
    keeper: RwLock<Option<(Arc<dyn Keeper>, usize)>>,
}

/// Owner of blocks whose parameters are divided among ranks.
pub(crate) trait Keeper: Send + Sync {
    /// Gathers the parameters of the block of this number. Returns `true` if they must be released after use.
    fn gather(&self, block: usize) -> Result<bool>;

    /// Frees the parameters of a block.
    fn release(&self, block: usize);
}

/// Guard of a block whose parameters are gathered; dropping it releases them.
pub(crate) struct Held(Arc<dyn Keeper>, usize);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.release(self.1);
    }
}

impl Block {
    pub(super) fn new(place: String, params: Vec<Param>, may_be_skipped: bool) -> Self {
        Self(Arc::new(Cell { place, params, may_be_skipped, keeper: RwLock::new(None) }))
    }

    /// Returns the beginning of the names of its parameters, with the last dot.
    pub fn place(&self) -> &str {
        &self.0.place
    }

    pub fn params(&self) -> &[Param] {
        &self.0.params
    }

    /// Returns `true` if a forward pass may leave the block out.
    pub fn may_be_skipped(&self) -> bool {
        self.0.may_be_skipped
    }

    /// Gives the block an owner, which knows it by a number.
    pub fn keep(&self, keeper: Arc<dyn Keeper>, number: usize) {
        *self.0.keeper.write().unwrap_or_else(PoisonError::into_inner) = Some((keeper, number));
    }

    /// Gathers the parameters, if they are divided, until the guard is dropped.
    ///
    /// Errors: those of the owner.
    pub fn hold(&self) -> Result<Option<Held>> {
        let keeper = self.0.keeper.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((keeper, number)) = keeper else { return Ok(None) };
        Ok(keeper.gather(number)?.then(|| Held(keeper, number)))
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("place", &self.0.place).finish_non_exhaustive()
    }
}
