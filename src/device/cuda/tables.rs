//! Values on the device that kernels read besides their tensors: constants, and tables of addresses.

use std::{
    collections::BTreeMap,
    sync::{Arc, MutexGuard, PoisonError},
};

use super::{
    CudaDevice, error,
    memory::CudaMemory,
    pool::{Phase, Source},
};
use crate::{Result, device::gpu::Memory};

/// Limits of cached constants: their number and their bytes. A model has a few dozen.
const MOST: usize = 256;
const MOST_BYTES: usize = 64 << 20;

/// Constants by name. The least recently used are dropped first when there are too many, since names contain sizes that
/// callers choose.
#[derive(Default)]
pub(super) struct Constants {
    by_name: BTreeMap<String, Constant>,
    /// Number of uses so far.
    clock: u64,
}

struct Constant {
    memory: Arc<dyn Memory>,
    bytes: usize,
    /// Time of its last use.
    used: u64,
}

impl Constants {
    fn get(&mut self, name: &str) -> Option<Arc<dyn Memory>> {
        let constant = self.by_name.get_mut(name)?;
        self.clock += 1;
        constant.used = self.clock;
        Some(constant.memory.clone())
    }

    fn insert(&mut self, name: &str, memory: Arc<dyn Memory>, bytes: usize) {
        self.clock += 1;
        self.by_name.insert(name.into(), Constant { memory, bytes, used: self.clock });
    }

    /// Drops constants, except the last one, until the others are within the limits. Kernels already enqueued with them
    /// run before the next use of their memory.
    fn evict(&mut self) {
        let mut total: usize = self.by_name.values().map(|constant| constant.bytes).sum();
        while self.by_name.len() > 1 && (self.by_name.len() > MOST || total > MOST_BYTES) {
            let oldest = self.by_name.iter().min_by_key(|(_, constant)| constant.used).map(|(name, _)| name.clone());
            let Some(constant) = oldest.and_then(|name| self.by_name.remove(&name)) else { break };
            total -= constant.bytes;
        }
    }
}

/// Tables by name, with the values that they hold.
pub(super) type Tables = BTreeMap<String, (Vec<i64>, Arc<dyn Memory>)>;

/// Tables of the graph that is being recorded, with their values, and the number that the recording has reached.
#[derive(Default)]
pub(super) struct GraphTables {
    pub made: Vec<(Arc<dyn Memory>, Vec<i64>)>,
    used: usize,
}

impl CudaDevice {
    /// Returns values on the device that do not depend on the data: computed and uploaded on the first call with this
    /// name.
    pub(super) fn kept_constant(
        &'static self,
        name: &str,
        values: &mut dyn FnMut() -> Result<Vec<i64>>,
    ) -> Result<Arc<dyn Memory>> {
        let lock = || self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(constant) = lock().get(name) {
            return Ok(constant);
        }
        // Not below the lock: an upload may wait for a capture, which needs the lock.
        let values = values()?;
        let constant = self.uploaded(&values)?;
        let mut constants = lock();
        if let Some(constant) = constants.get(name) {
            return Ok(constant);
        }
        constants.insert(name, constant.clone(), size_of_val(&values[..]));
        // Constants that a recording will request again must stay.
        if self.phase() == Phase::Eager {
            constants.evict();
        }
        Ok(constant)
    }

    /// Returns numbers on the device that seldom differ from those of the last call with this name; uploaded if they
    /// do. A graph that is being recorded gets its own tables, which are filled at the end of the recording.
    pub(super) fn kept_table(&'static self, name: &str, values: Vec<i64>) -> Result<Arc<dyn Memory>> {
        if self.phase() != Phase::Eager {
            return self.table_of_graph(values);
        }
        drop(self.enter("an upload")?);
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, table)) = tables.get_mut(name) {
            if *known == values {
                return Ok(table.clone());
            }
            // Overwrites the old table, which earlier launches have read when the copy begins: a new allocation would
            // move later ones. A table that another thread is still to launch with stays unchanged.
            if known.len() == values.len() && Arc::get_mut(table).is_some() {
                self.upload_at(table.address(), bytemuck::cast_slice(&values))?;
                *known = values;
                return Ok(table.clone());
            }
        }
        let table = self.uploaded(&values)?;
        tables.insert(name.into(), (values, table.clone()));
        Ok(table)
    }

    /// Returns the next table of a graph: the first run creates them, the recording visits them again.
    fn table_of_graph(&'static self, values: Vec<i64>) -> Result<Arc<dyn Memory>> {
        let mut tables = self.graph_tables();
        if self.captures() {
            let used = tables.used;
            let known = tables.made.get_mut(used).filter(|(_, known)| known.len() == values.len());
            let (table, known) = known.ok_or_else(|| {
                error(
                    "recording a graph differs from the run before it; the closure must do the same work each time"
                        .into(),
                )
            })?;
            // Some are addresses of tensors, which the graph must hold; a number that looks like one is harmless.
            for &value in &values {
                self.pool.hold(value as u64);
            }
            *known = values;
            let table = table.clone();
            tables.used += 1;
            return Ok(table);
        }
        // Needs memory that no other tensor of the graph uses, before or after, so blocks free for those do not serve.
        self.pool.set_source(Source::Aside);
        let table = self.uploaded(&values);
        self.pool.set_source(Source::Freed);
        let table = table?;
        tables.made.push((table.clone(), values));
        Ok(table)
    }

    /// Uploads values to new memory.
    fn uploaded(&'static self, values: &[i64]) -> Result<Arc<dyn Memory>> {
        let memory = CudaMemory::new(size_of_val(values).max(size_of::<i64>()), self)?;
        self.upload_at(memory.address(), bytemuck::cast_slice(values))?;
        // Which thread was the first to need them means nothing to others.
        memory.forget_writers();
        Ok(Arc::new(memory))
    }

    /// Returns the tables of the graph that this thread records.
    pub(super) fn graph_tables(&self) -> MutexGuard<'_, GraphTables> {
        self.graph_tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
