//! Promise: on a real Kubernetes, what the demo tells holds with kubectl: installed, labelled, meshed, decided, split, and
//! gone again; through stopped programs, and without one byte in clear from a pod that has only just started.

#[path = "cluster/faults.rs"]
mod faults;
#[path = "cluster/install.rs"]
mod install;
#[path = "cluster/objects.rs"]
mod objects;
#[path = "cluster/paths.rs"]
mod paths;
#[path = "cluster/probes.rs"]
mod probes;
#[path = "cluster/start.rs"]
mod start;
#[path = "cluster/story.rs"]
mod story;

use std::process::ExitCode;

use mesh_tests::{Suite, cluster::Cluster};

fn main() -> ExitCode {
    let mut suite = Suite::over(Cluster::from_env);
    // In this order: each leaves the cluster as the next one takes it.
    suite.case("bookinfo_runs_without_the_mesh", story::without_the_mesh);
    suite.case("install_makes_every_node_ready", install::install);
    suite.case("one_label_enrols_running_pods", story::enrol);
    suite.case("the_wire_between_nodes_is_tls", story::encrypted);
    suite.case("paths_are_as_they_should_be", paths::paths);
    suite.case("policy_refuses_who_has_no_business", story::policy);
    suite.case("a_waypoint_splits_and_routes", story::canary);
    suite.case("a_waypoint_comes_and_goes_by_command", objects::waypoint);
    suite.case("what_is_wrong_is_told_and_harms_nobody", objects::told);
    suite.case("probes_reach_strict_pods_and_imitators_do_not", probes::probes);
    suite.case("a_starting_pod_sends_nothing_in_clear", start::no_leak);
    suite.case("an_agent_that_dies_fails_closed_and_comes_back", faults::agent);
    suite.case("the_api_server_may_be_away", faults::api_server);
    suite.case("the_control_plane_may_be_away", faults::control_plane);
    suite.case("an_upgrade_replaces_every_process", install::upgrade);
    suite.case("uninstall_leaves_nothing", install::uninstall);
    suite.case("other_profiles_and_the_operator_s_root", install::profiles);
    suite.run()
}
