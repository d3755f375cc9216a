//! Ranks that launchers give their processes in variables of the environment.

use std::fmt;

use crate::{Error, Result, collect::CollectVec, error::ensure};

/// Program that starts a process for each rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Launcher {
    /// `mpirun` of Open MPI: `OMPI_COMM_WORLD_RANK`, `OMPI_COMM_WORLD_SIZE`, `OMPI_COMM_WORLD_LOCAL_RANK`.
    OpenMpi,
    /// `mpiexec` of MPICH or Intel MPI: `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID`.
    Mpich,
    /// `torchrun`: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`.
    Torchrun,
    /// `srun` of Slurm: `SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_LOCALID`, in a step (`SLURM_STEP_ID`).
    Slurm,
}

impl Launcher {
    /// Variables of the rank, the number of ranks, and the rank among those of the same machine.
    const fn variables(self) -> [&'static str; 3] {
        match self {
            Self::OpenMpi => ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
            Self::Mpich => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
            Self::Torchrun => ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            Self::Slurm => ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
        }
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenMpi => "Open MPI",
            Self::Mpich => "MPICH",
            Self::Torchrun => "torchrun",
            Self::Slurm => "Slurm",
        })
    }
}

/// This process among those that a launcher has started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Program that started the process; `None` for a process by itself.
    pub launcher: Option<Launcher>,
    /// Number of the process, from 0 on.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Number of the process among those of the same machine: the GPU for it, for instance. 0 if the launcher does not
    /// say.
    pub local_rank: usize,
}

impl Launch {
    /// Reads the environment.
    ///
    /// The first launcher of [`Launcher`]'s list that has set a rank or a number of ranks counts: `mpirun` in an
    /// allocation of Slurm finds variables of both.
    ///
    /// Errors: a rank without a number of ranks or the reverse; text that is no number; a rank that is not below the
    /// number; MPI and torchrun that contradict each other.
    pub fn from_env() -> Result<Self> {
        Self::of(&|name| std::env::var(name).ok())
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut launches = Vec::new();
        for launcher in [Launcher::OpenMpi, Launcher::Mpich, Launcher::Torchrun, Launcher::Slurm] {
            // The shell of an allocation has the other variables too.
            if launcher != Launcher::Slurm || variable("SLURM_STEP_ID").is_some_and(|step| step.parse::<u32>().is_ok())
            {
                launches.extend(Self::by(launcher, variable)?);
            }
        }
        let Some(&first) = launches.first() else {
            return Ok(Self { launcher: None, rank: 0, size: 1, local_rank: 0 });
        };
        for other in launches.iter().filter(|other| other.launcher != Some(Launcher::Slurm)) {
            let (Some(a), Some(b)) = (first.launcher, other.launcher) else { continue };
            ensure!(
                (first.rank, first.size) == (other.rank, other.size),
                Error::argument(
                    "launch",
                    format_args!(
                        "{a} says rank {} of {} ({}), {b} rank {} of {} ({}); unset those of the launcher that did not start \
                         this process",
                        first.rank,
                        first.size,
                        a.variables()[0],
                        other.rank,
                        other.size,
                        b.variables()[0]
                    )
                )
            );
        }
        Ok(first)
    }

    fn by(launcher: Launcher, variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let names = launcher.variables();
        let values = names.iter().map(|name| variable(name)).collect_vec();
        let number = |at: usize| -> Result<usize> {
            let name = names[at];
            let text = values[at].as_deref().ok_or_else(|| {
                let set = names[1 - at];
                Error::argument("launch", format_args!("{set} is set, but {name} is not; {launcher} sets both"))
            })?;
            text.parse()
                .map_err(|_| Error::argument("launch", format_args!("expected a number in {name}, got `{text}`")))
        };
        if values[0].is_none() && values[1].is_none() {
            return Ok(None);
        }
        let (rank, size) = (number(0)?, number(1)?);
        ensure!(
            rank < size,
            Error::argument("launch", format_args!("expected {} below {} = {size}, got {rank}", names[0], names[1]))
        );
        let local_rank = if values[2].is_some() { number(2)? } else { 0 };
        Ok(Some(Self { launcher: Some(launcher), rank, size, local_rank }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::of(&|name| variables.iter().find(|(at, _)| *at == name).map(|(_, value)| value.to_string()))
    }

    fn refused(variables: &[(&str, &str)], parts: &[&str]) {
        let message = launch(variables).expect_err("refused").to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }

    #[test]
    fn launchers_are_known_by_their_variables() -> Result<()> {
        let alone = Launch { launcher: None, rank: 0, size: 1, local_rank: 0 };
        assert_eq!(launch(&[])?, alone);
        // The shell of an allocation.
        assert_eq!(launch(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")])?, alone);
        assert_eq!(launch(&[("SLURM_NTASKS", "4")])?, alone);
        let slurm = [("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1"), ("SLURM_STEP_ID", "0")];
        assert_eq!(launch(&slurm)?, Launch { launcher: Some(Launcher::Slurm), rank: 3, size: 4, local_rank: 1 });
        let open = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let expected = Launch { launcher: Some(Launcher::OpenMpi), rank: 1, size: 2, local_rank: 0 };
        assert_eq!(launch(&open)?, expected);
        assert_eq!(launch(&[&open[..], &slurm[..]].concat())?, expected);
        assert_eq!(launch(&[&open[..], &[("RANK", "1"), ("WORLD_SIZE", "2")]].concat())?, expected);
        assert_eq!(launch(&[("RANK", "0"), ("WORLD_SIZE", "1")])?.launcher, Some(Launcher::Torchrun));
        assert_eq!(launch(&[("PMI_RANK", "0"), ("PMI_SIZE", "8")])?.size, 8);
        Ok(())
    }

    #[test]
    fn wrong_variables_are_named() {
        refused(&[("RANK", "1")], &["RANK is set", "WORLD_SIZE is not", "torchrun"]);
        refused(&[("WORLD_SIZE", "2")], &["WORLD_SIZE is set", "RANK is not"]);
        refused(&[("RANK", "one"), ("WORLD_SIZE", "2")], &["RANK", "`one`"]);
        refused(&[("RANK", "2"), ("WORLD_SIZE", "2")], &["RANK below WORLD_SIZE = 2", "got 2"]);
        let both = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2"), ("RANK", "0"), ("WORLD_SIZE", "2")];
        refused(&both, &["Open MPI says rank 1 of 2", "torchrun rank 0 of 2", "RANK"]);
    }
}
