//! One suite: cases by name, run one after the other or side by side, over worlds that end with the suite.

use std::{process::ExitCode, sync::Arc};

use libtest_mimic::{Arguments, Failed, Trial};

use crate::world::{self, World};

/// Cases of a suite that share the world `W`.
pub struct Suite<W> {
    world: Arc<Result<W, String>>,
    arguments: Arguments,
    trials: Vec<Trial>,
}

impl<W: Send + Sync + 'static> Suite<W> {
    /// A suite over the world that `up` builds, unless the cases are only to be listed. A world that does not come
    /// up fails every case with the reason.
    pub fn over(up: impl FnOnce() -> anyhow::Result<W>) -> Self {
        let arguments = Arguments::from_args();
        let world = if arguments.list {
            Err("listing only".into())
        } else {
            up().map_err(|error| format!("{error:#}"))
        };
        Self { world: Arc::new(world), arguments, trials: Vec::new() }
    }

    /// Adds a case.
    pub fn case(
        &mut self,
        name: impl Into<String>,
        run: impl FnOnce(&W) -> anyhow::Result<()> + Send + 'static,
    ) {
        let world = self.world.clone();
        self.trials.push(Trial::test(name, move || {
            let world = world.as_ref().as_ref().map_err(|why| format!("the world did not come up: {why}"))?;
            run(world).map_err(|error| Failed::from(format!("{error:#}")))
        }));
    }

    /// Adds, as the last case, that the others have left nothing in the agents and in the kernel.
    pub fn leaves_nothing(&mut self, world: fn(&W) -> &World) {
        self.case("nothing_is_left_of_all_this", move |fixture| world(fixture).nothing_leaks());
    }

    /// Runs the cases in order, one at a time (they share the world's policies), and takes the world down. Fails too
    /// when that leaves something behind.
    pub fn run(mut self) -> ExitCode {
        self.arguments.test_threads = Some(1);
        let conclusion = libtest_mimic::run(&self.arguments, self.trials);
        drop(self.world);
        if world::left_behind() { ExitCode::FAILURE } else { conclusion.exit_code() }
    }
}
