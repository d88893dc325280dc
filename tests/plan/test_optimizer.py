from cogvideox_factory.plan.optimizer import optimizer_memory


def test_the_figures_users_know():
    """16 bytes a parameter and the half weights, 8 with stochastic rounding (6 with 8-bit moments too)."""
    shapes = [(3072, 3072)]

    def bytes_each(optimizer, **options):
        memory = optimizer_memory(optimizer, shapes, **options)
        return sum((memory.weights, memory.gradients, memory.masters, memory.state)) / 3072**2

    assert bytes_each("adamw", half=True) == 18
    assert bytes_each("adamw", half=False) == 16
    assert bytes_each("adamw", half=True, stochastic=True) == 8
    assert 6 < bytes_each("adamw8bit", half=True, stochastic=True) < 6.1
    assert bytes_each("prodigy", half=False) == 24
    assert 12 < bytes_each("came", half=False) < 12.01
