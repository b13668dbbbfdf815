use super::*;

const SIZE: u32 = 1 << 20;

/// A window whose peer uses all of it at once, and who reads `share` of that.
fn round(window: &mut Window, now: Instant, round_trip: Duration) -> u32 {
    assert!(window.receive(u32::try_from(window.size).unwrap()));
    window.release(usize::try_from(window.size).unwrap());
    window.due(|| now, round_trip).unwrap()
}

#[test]
fn half_a_window_is_given_back_at_once() {
    let (mut window, now) = (Window::new(SIZE), Instant::now());
    assert!(window.receive(SIZE / 2));
    window.release(SIZE as usize / 2 - 1);
    assert_eq!(window.due(|| now, Duration::ZERO), None);
    window.release(1);
    assert_eq!(window.due(|| now, Duration::ZERO), Some(SIZE / 2));
    assert!(window.receive(SIZE));
    assert!(!window.receive(1), "not more than that");
}

/// In one test, for the budget is one.
#[test]
fn windows_follow_the_need_under_the_budget() {
    let (begin, round_trip) = (Instant::now(), Duration::from_millis(50));
    let mut calm = Window::new(SIZE);
    for n in 0..10 {
        round(&mut calm, begin + n * 4 * round_trip, round_trip);
    }
    assert_eq!(calm.size, u64::from(SIZE));
    let mut busy = Window::new(SIZE);
    for n in 0..20 {
        round(&mut busy, begin + n * round_trip, round_trip);
    }
    assert_eq!(busy.size, LARGEST_WINDOW_BYTES);
    let others: Vec<Window> = (0..8)
        .map(|_| {
            let mut other = Window::new(SIZE);
            for n in 0..20 {
                round(&mut other, begin + n * round_trip, round_trip);
            }
            other
        })
        .collect();
    let all: u64 = others.iter().chain([&busy]).map(|window| window.size - u64::from(SIZE)).sum();
    assert!(all <= GROWN_BYTES as u64, "{all}");
    drop((busy, others));

    // What waits for stalled readers does not take the window from the others.
    let mut window = Window::new(SIZE);
    for _ in 0..20 {
        assert!(window.receive(SIZE / 2));
        assert!(window.relieve().is_some(), "so much is free again");
    }
    assert_eq!(window.waiting(), 10 * u64::from(SIZE));
    // It is read at last, and not given a second time.
    window.release(10 * SIZE as usize);
    assert_eq!((window.advance.0, window.due(|| begin, Duration::ZERO)), (0, None));
    assert!(window.receive(SIZE) && !window.receive(1));
}
