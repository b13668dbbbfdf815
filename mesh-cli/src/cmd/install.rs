//! `meshctl install` and `meshctl upgrade`.

use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;
use serde_json::Value;

use super::{duration, within_runtime};
use crate::{
    chart::{self, Profile, values},
    cluster::{Cluster, Target},
    install::{self, Plan, record::Record},
    output::print,
};

/// Where an installation is.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    #[command(flatten)]
    pub target: Target,
    /// Namespace of the installation.
    #[arg(short, long, default_value = "undermesh-system", value_name = "NAMESPACE")]
    pub namespace: String,
}

/// Arguments of `install` and `upgrade`.
#[derive(Debug, clap::Args)]
pub struct InstallArgs {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    pub settings: SettingArgs,
    /// Print the objects and change nothing; asks no cluster.
    #[arg(long)]
    dry_run: bool,
    /// Go on in spite of errors of the checks.
    #[arg(long)]
    force: bool,
    /// How long everything together may take.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

/// What can be set.
#[derive(Clone, Debug, clap::Args)]
pub struct SettingArgs {
    /// Named set of values.
    #[arg(short, long, value_enum)]
    pub profile: Option<Profile>,
    /// Values from a file, over those of the profile; repeatable.
    #[arg(short = 'f', long = "values", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// One value, over those of files: key.key=value; repeatable. The keys: deploy/helm/undermesh/values.yaml.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl SettingArgs {
    /// The layers above the profile as one.
    ///
    /// # Errors
    /// A file or flag that cannot be read.
    pub fn layer(&self) -> anyhow::Result<Value> {
        let mut all = values::layer("nothing", "")?;
        for file in &self.files {
            let yaml = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            values::overlay(&mut all, values::layer(&file.display().to_string(), &yaml)?);
        }
        for set in &self.sets {
            values::overlay(&mut all, values::set(set)?);
        }
        Ok(all)
    }
}

/// Installs.
///
/// # Errors
/// What went wrong, for the user.
pub fn install(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    let plan = args.plan(None)?;
    if args.dry_run {
        print(&chart::stream(&plan.objects()?)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    within_runtime(async {
        let cluster = Cluster::connect(&args.place.target).await?;
        let former = Record::read(&cluster, &args.place.namespace).await?;
        install::run(&cluster, plan, former).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Installs this version over another one and keeps what was set.
///
/// # Errors
/// What went wrong, for the user.
pub fn upgrade(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    within_runtime(async {
        let cluster = Cluster::connect(&args.place.target).await?;
        let namespace = &args.place.namespace;
        let Some(former) = Record::read(&cluster, namespace).await? else {
            bail!("nothing is installed in {namespace} by meshctl: `meshctl install`, or Helm's own upgrade");
        };
        let plan = args.plan(Some(&former))?;
        if args.dry_run {
            print(&chart::stream(&plan.objects()?)?)?;
            return Ok(());
        }
        install::run(&cluster, plan, Some(former)).await
    })?;
    Ok(ExitCode::SUCCESS)
}

impl InstallArgs {
    fn plan(&self, former: Option<&Record>) -> anyhow::Result<Plan> {
        let plan = plan(&self.settings, &self.place.namespace, former)?;
        Ok(Plan { force: self.force, timeout: self.timeout, ..plan })
    }
}

/// (pure but for the files) What is asked for, over what was set before.
///
/// # Errors
/// A setting that cannot be.
pub fn plan(settings: &SettingArgs, namespace: &str, former: Option<&Record>) -> anyhow::Result<Plan> {
    let before = former.map(|former| Profile::from_str(&former.profile, false));
    let profile = match (settings.profile, before) {
        (Some(profile), _) | (None, Some(Ok(profile))) => profile,
        (None, Some(Err(unknown))) => bail!("the profile of the installation: {unknown}: set --profile"),
        (None, None) => Profile::default(),
    };
    let mut layer = values::layer("nothing", "")?;
    if let Some(former) = former {
        values::overlay(&mut layer, former.values.clone());
    }
    values::overlay(&mut layer, settings.layer()?);
    let values = chart::values(profile, vec![layer.clone()])?;
    Ok(Plan {
        namespace: namespace.to_owned(),
        profile,
        layer,
        values,
        force: false,
        timeout: Duration::ZERO,
    })
}
